"""Scaled dot-product attention in closed form, on a CPU.

A backend's kernel keeps no probabilities and makes them anew on the way back, as the library's blockwise kernel does.
In bfloat16 the latter's way back is many times slower than four small products, so that short sequences keep their
probabilities instead.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from unlocked.workers.graph.operations import Casts, Gradients, Replaceable
from unlocked.workers.graph.shapes import Split
from unlocked.workers.graph.tracing import Node

__all__ = ["Attention", "SplitAttention", "reader_of"]

aten = torch.ops.aten
_SHORT = 256  # tokens: what is kept grows by their square


class Attention(Replaceable):
    """softmax(s q kT) v, without mask and dropout.

    Args:
        causal: query i sees the keys up to i alone.
        scale: s; None: 1 / sqrt(d).
    """

    def __init__(self, casts: Casts, *, causal: bool = False, scale: float | None = None) -> None:
        self._casts, self._causal, self._scale = casts, causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[..., T, d], [..., S, d] and [..., S, d] -> [..., T, d]; what stands before tokens may be broadcast."""
        self._by: ModuleType | None = None
        q, k, v = self._aligned(q, k, v)
        if self.backend is not None and self.backend.takes_attention(q, k, v):
            self._by = self.backend
            result, sums = self._by.attention_forward(q, k, v, causal=self._causal, scale=self._scale)
            self._kept: tuple[Tensor, ...] = (q, k, v, result, sums)
            return result
        short = max(q.shape[-2], k.shape[-2]) <= _SHORT
        if q.dim() != 4 or v.shape[-1] != q.shape[-1] or (q.dtype == torch.bfloat16 and short):
            return self._by_products(q, k, v)
        result, sums = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, self._causal, scale=self._scale)
        self._kept = (q, k, v, result, sums)
        return result

    def _aligned(self, *given: Tensor) -> list[Tensor]:
        """q, k and v as kernels take them: in the type that is computed with, of one shape up to the tokens, rows
        dense. Neither the library's kernel nor a product of rows looks whether they are."""
        shapes = [x.shape for x in given]
        common = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
        self._shapes = None if all(shape[:-2] == common for shape in shapes) else shapes
        cast = (self._casts.value(x) for x in given)
        return [_in_rows(x if self._shapes is None else x.expand(*common, *x.shape[-2:])) for x in cast]

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        grads = self._gradients(grad)
        if self._shapes is not None:
            grads = [g.sum_to_size(shape) for g, shape in zip(grads, self._shapes, strict=True)]
        return grads, []

    def _gradients(self, grad: Tensor) -> list[Tensor]:
        """Of q, k and v as `_aligned` gave them."""
        if self._by is not None:
            out = [torch.empty_like(x) for x in self._kept[:3]]
            self._write(grad, out)
            return out
        kept = self._kept
        del self._kept
        if len(kept) == 5:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, *kept, 0.0, self._causal, scale=self._scale
            )
            return list(grads)
        q, k, v, p = kept
        products = _rows(grad, p.shape)
        v_grad = torch.bmm(p.transpose(1, 2), products)
        p_grad = torch.bmm(products, v.transpose(1, 2))
        s_grad = aten._softmax_backward_data(p_grad, p, -1, p.dtype).mul_(self._factor(q))
        grads = (torch.bmm(s_grad, k), torch.bmm(s_grad.transpose(1, 2), q), v_grad)
        return [g.view(*grad.shape[:-2], *g.shape[1:]) for g in grads]

    @property
    def writes_gradients(self) -> bool:
        """The last `forward` was a backend's, of equal shapes: `write_gradients` is there for the way back."""
        return self._by is not None and self._shapes is None

    def write_gradients(self, grad: Tensor, out: Sequence[Tensor]) -> None:
        """`backward` into tensors that are there, in the shapes of q, k and v. Where it `writes_gradients`."""
        self._write(grad, out)

    def _write(self, grad: Tensor, out: Sequence[Tensor]) -> None:
        kept = self._kept
        del self._kept
        assert self._by is not None
        self._by.attention_backward(grad, *kept, out, causal=self._causal, scale=self._scale)

    def _by_products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [x.reshape(-1, *x.shape[-2:]) for x in (q, k, v)]
        scores = torch.bmm(rows[0], rows[1].transpose(1, 2)).mul_(self._factor(q))
        if self._causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu_(1)
            scores.masked_fill_(hidden, float("-inf"))
        p = torch.softmax(scores, -1)
        self._kept = (*rows, p)
        return torch.bmm(p, rows[2]).view(*q.shape[:-1], v.shape[-1])

    def _factor(self, q: Tensor) -> float:
        return q.shape[-1] ** -0.5 if self._scale is None else self._scale


class SplitAttention(Replaceable):
    """Attention of the parts of one tensor, whose gradients are written where that tensor's belong.

    Args:
        split: of the tensor.
        order: which of its parts, in the order in which they are read, are queries, keys and values.
    """

    def __init__(self, split: Split, order: Sequence[int], attention: Attention) -> None:
        self._split, self._order, self.attention = split, order, attention

    @property
    def backend(self) -> ModuleType | None:
        """The attention's."""
        return self.attention.backend

    @backend.setter
    def backend(self, backend: ModuleType | None) -> None:
        self.attention.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose parts are [..., T, d] -> [..., T, d]."""
        parts = self._split.forward(x)
        return self.attention.forward(*(parts[place] for place in self._order))

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        if not self.attention.writes_gradients:
            grads, _ = self.attention.backward(grad, [True] * 3)
            given = [grads[self._order.index(place)] for place in range(3)]
            return self._split.backward(given, wanted)
        whole, places = self._split.empty(grad)
        self.attention.write_gradients(grad, [places[place] for place in self._order])
        return [whole], []


def reader_of(parts: Sequence[Node]) -> Node | None:
    """What alone reads these three parts of a tensor, which are all that it reads."""
    readers = {user for part in parts for user in part.users}
    numbers = {part.args[1] for part in parts}  # one may be there twice, the second time counted from the end
    if len(parts) != 3 or len(readers) != 1 or len(numbers) != 3 or len({number < 0 for number in numbers}) != 1:
        return None
    (reader,) = readers
    alone = all(len(part.users) == 1 for part in parts) and sorted(map(id, reader.inputs)) == sorted(map(id, parts))
    return reader if alone else None


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad.reshape(shape[0], shape[1], grad.shape[-1])
