"""Scaled dot-product attention in closed form, on a CPU.

The library's blockwise kernel keeps no probabilities and makes them anew on the way back. In bfloat16 that way back is
many times slower than four small products, so that short sequences keep their probabilities instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlocked.workers.graph.operations import Gradients, Operation

__all__ = ["Attention"]

aten = torch.ops.aten
_SHORT = 256  # tokens: what is kept grows by their square


class Attention(Operation):
    """softmax(q kT / sqrt(d)) v, without mask and dropout."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[..., T, d], [..., S, d] and [..., S, d] -> [..., T, d]."""
        short = max(q.shape[-2], k.shape[-2]) <= _SHORT
        if q.dim() != 4 or v.shape[-1] != q.shape[-1] or (q.dtype == torch.bfloat16 and short):
            return self._by_products(q, k, v)
        result, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        self._kept: tuple[Tensor, ...] = (q, k, v, result, sums)
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        kept = self._kept
        del self._kept
        if len(kept) == 5:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, *kept, 0.0, False)
            return list(grads), []
        q, k, v, p = kept
        products = _rows(grad, p.shape)
        v_grad = torch.bmm(p.transpose(1, 2), products)
        p_grad = torch.bmm(products, v.transpose(1, 2))
        s_grad = aten._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
        grads = (torch.bmm(s_grad, k), torch.bmm(s_grad.transpose(1, 2), q), v_grad)
        return [g.view(*grad.shape[:-2], *g.shape[1:]) for g in grads], []

    def _by_products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
        scores = torch.bmm(rows[0], rows[1].transpose(1, 2)).mul_(q.shape[-1] ** -0.5)
        p = torch.softmax(scores, -1)
        self._kept = (*rows, p)
        return torch.bmm(p, rows[2]).view(*q.shape[:-1], v.shape[-1])


def _rows(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad.reshape(shape[0], shape[1], grad.shape[-1])
