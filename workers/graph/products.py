"""Products of activations and weights: which library makes them, and their gradients in closed form."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.workers.graph.operations import Casts, Gradients, Operation, trained

__all__ = ["Linear", "Product", "bias_gradient", "input_gradient", "product", "weight_gradient"]

_LARGE = 1 << 22  # multiply-adds from which another library's call is worth its while


class Linear(Operation):
    """A product with a weight, of whatever dimensions stand before the features.

    Args:
        bias_is_ahead: as of `Convolution`, where the result is [B, D]; a BatchNorm after one of more dimensions has
            other channels than the bias, which is added then.
    """

    def __init__(self, linear: nn.Linear, casts: Casts, *, bias_is_ahead: bool = False) -> None:
        self.linear, self._casts = linear, casts
        self._matrix, self._bias = linear.weight, linear.bias
        self.parameters = trained(linear.weight, linear.bias)
        self._zero = torch.zeros_like(linear.bias) if bias_is_ahead and linear.bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D]."""
        self._x = self._casts.value(x)
        self._weight = self._casts.weight(self._matrix, self._x.dtype)
        adds = self._bias is not None and (self._zero is None or x.dim() > 2)
        bias = self._casts.weight(self._bias, self._x.dtype) if adds else None
        return product(self._x, self._weight, bias)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return self.with_sums(grad, None, wanted)

    def with_sums(self, grad: Tensor, sums: Tensor | None, wanted: Sequence[bool]) -> Gradients:
        """`backward` where the bias's gradient, the sums of `grad` over its rows, [D], is known already."""
        x, weight = self._x, self._weight
        del self._x, self._weight
        x_grad = input_gradient(grad, weight) if wanted[0] else None
        grads = [weight_gradient(grad, x)] if self._matrix.requires_grad else []
        if self._bias is not None and self._bias.requires_grad:
            of_bias = self._zero if self._zero is not None and x.dim() == 2 else sums
            grads.append(bias_gradient(grad) if of_bias is None else of_bias)
        return [x_grad], grads


class Product(Operation):
    """The same of a weight and a bias that are values like others: parameters that a forward() uses as they are."""

    def __init__(self, casts: Casts) -> None:
        self._casts = casts

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., D_in], [D, D_in] and [D] -> [..., D]."""
        self._x = self._casts.value(x)
        self._weight = weight.to(self._x.dtype)
        return product(self._x, self._weight, None if bias is None else bias.to(self._x.dtype))

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        x, weight = self._x, self._weight
        del self._x, self._weight
        grads = [input_gradient(grad, weight) if wanted[0] else None, weight_gradient(grad, x) if wanted[1] else None]
        return [*grads, *(bias_gradient(grad) if is_wanted else None for is_wanted in wanted[2:])], []


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """At the input [..., D_in] of a product with `weight` [D, D_in], from that at its result [..., D].

    Of tokens [B, T, D] all of which have the same gradient, a view of one each (as pooled latents give it), one is
    computed; the other two functions take less of them likewise.
    """
    if _is_shared(grad):
        return (grad[:, 0] @ weight).unsqueeze(1).expand(-1, grad.shape[1], -1)
    return product(grad, weight.T)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """That of the weight, [D, D_in], from the gradient [..., D] and the input [..., D_in]."""
    if _is_shared(grad):
        grad, x = grad[:, 0], x.sum(1)
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def bias_gradient(grad: Tensor) -> Tensor:
    """The sums [D] of a gradient [..., D]."""
    return grad[:, 0].sum(0).mul_(grad.shape[1]) if _is_shared(grad) else grad.reshape(-1, grad.shape[-1]).sum(0)


def _is_shared(grad: Tensor) -> bool:
    return grad.dim() == 3 and grad.shape[1] > 1 and grad.stride(1) == 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightT + bias, [..., D_in] -> [..., D], of a weight [D, D_in] and a bias [D] of any strides.

    Large float32 products of tokens go to oneDNN on AMD's processors, where torch's other library, MKL, takes a fifth
    more time (docs/performance.md); which one depends on shapes and the processor alone. A weight's own gradient, whose
    long dimension is summed over, is no faster there.
    """
    large = x.dim() > 2 and x.numel() * weight.shape[0] >= _LARGE
    if large and x.dtype == torch.float32 and x.device.type == "cpu" and _prefers_onednn():
        bias = None if bias is None else bias.contiguous()  # alone of the three it is read as if it were
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


@lru_cache
def _prefers_onednn() -> bool:
    """The processor is AMD's, and this torch has the operation."""
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text()
    return amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
