"""GELU by the exact normal distribution, on a backend's kernels, alone or with the product before it."""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.workers.graph.operations import Casts, Gradients, Operation
from unlocked.workers.graph.products import Linear
from unlocked.workers.graph.tracing import Node, has_hooks

__all__ = ["Gelu", "GeluLinear", "is_gelu"]


def is_gelu(node: Node) -> bool:
    """It computes x Phi(x), not the approximation by tanh."""
    target = node.target
    if isinstance(target, nn.Module):
        return type(target) is nn.GELU and target.approximate == "none" and not has_hooks(target)
    plain = len(node.args) == 1 and node.kwargs.get("approximate", "none") == "none"
    return target is F.gelu and plain and node.kwargs.keys() <= {"approximate"}


class Gelu(Operation):
    """Keeps the derivative, which the forward kernel has at hand, in the input's stead."""

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        self._is_image = x.dim() == 4 and not x.is_contiguous()  # its channels lie together, or will
        x = x.permute(0, 2, 3, 1) if self._is_image else x
        y, self._slope = self._backend.gelu_forward(x.contiguous(), in_place=not x.is_contiguous())
        result: Tensor = y.permute(0, 3, 1, 2) if self._is_image else y
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        slope = self._slope
        del self._slope
        grad = grad.permute(0, 2, 3, 1) if self._is_image else grad
        given: Tensor = self._backend.gelu_backward(grad, slope)[0]
        return [given.permute(0, 3, 1, 2) if self._is_image else given], []


class GeluLinear(Operation):
    """A product and the GELU that alone reads it: the bias's gradient comes with the way back through GELU."""

    def __init__(self, linear: nn.Linear, casts: Casts, backend: ModuleType) -> None:
        self._linear, self._backend = Linear(linear, casts), backend
        self.parameters = self._linear.parameters

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D]."""
        y, self._slope = self._backend.gelu_forward(self._linear.forward(x), in_place=True)
        result: Tensor = y
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        slope = self._slope
        del self._slope
        given, sums = self._backend.gelu_backward(grad, slope)
        # A sum of bfloat16 is bfloat16, as the library's.
        return self._linear.with_sums(given, sums if given.dtype == torch.float32 else sums.to(given.dtype), wanted)
