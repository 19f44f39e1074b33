"""GELU by the exact normal distribution and SiLU, on a backend's kernels, alone or with the product before it."""

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.workers.graph.operations import Casts, Gradients, Operation
from unlocked.workers.graph.products import Linear
from unlocked.workers.graph.tracing import Node, has_hooks

__all__ = ["Gelu", "GeluLinear", "Silu", "gelu_of", "is_gelu", "is_silu"]


def is_gelu(node: Node) -> bool:
    """It computes x Phi(x), not the approximation by tanh."""
    target = node.target
    if isinstance(target, nn.Module):
        return type(target) is nn.GELU and target.approximate == "none" and not has_hooks(target)
    plain = len(node.args) == 1 and node.kwargs.get("approximate", "none") == "none"
    return target is F.gelu and plain and node.kwargs.keys() <= {"approximate"}


def is_silu(node: Node) -> bool:
    """It computes x / (1 + e^-x)."""
    target = node.target
    if isinstance(target, nn.Module):
        return type(target) is nn.SiLU and not has_hooks(target)
    return target is F.silu and len(node.inputs) == 1


def gelu_of(node: Node, backend: ModuleType) -> "Gelu | None":
    """The operation of a GELU, or of a SiLU; None: the backend does not have it, or it is neither."""
    if backend.ABILITIES.gelu and is_gelu(node):
        return Gelu(backend)
    return Silu(backend) if backend.ABILITIES.silu and is_silu(node) else None


class Gelu(Operation):
    """Keeps the derivative, which the forward kernel has at hand, in the input's stead."""

    def __init__(self, backend: ModuleType) -> None:
        self._backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        self._is_image = x.dim() == 4 and not x.is_contiguous()  # its channels lie together, or will
        x = x.permute(0, 2, 3, 1) if self._is_image else x
        y, self._slope = self.activate(x.contiguous(), in_place=not x.is_contiguous())
        result: Tensor = y.permute(0, 3, 1, 2) if self._is_image else y
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        slope = self._slope
        del self._slope
        grad = grad.permute(0, 2, 3, 1) if self._is_image else grad
        given: Tensor = self._backend.gelu_backward(grad, slope)[0]
        return [given.permute(0, 3, 1, 2) if self._is_image else given], []

    def activate(self, x: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """The result and the derivative, which may take the place of `x`."""
        result: tuple[Tensor, Tensor] = self._backend.gelu_forward(x, in_place=in_place)
        return result


class Silu(Gelu):
    """Likewise."""

    def activate(self, x: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """As `Gelu.activate`."""
        result: tuple[Tensor, Tensor] = self._backend.silu_forward(x, in_place=in_place)
        return result


class GeluLinear(Operation):
    """A product and the GELU or SiLU that alone reads it: the bias's gradient comes with the way back through that."""

    def __init__(self, linear: nn.Linear, casts: Casts, backend: ModuleType, gelu: Gelu) -> None:
        self._linear, self._backend, self._gelu = Linear(linear, casts), backend, gelu
        self.parameters = self._linear.parameters

    def forward(self, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., D]."""
        y, self._slope = self._gelu.activate(self._linear.forward(x), in_place=True)
        return y

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        slope = self._slope
        del self._slope
        given, sums = self._backend.gelu_backward(grad, slope)
        # A sum of bfloat16 is bfloat16, as the library's.
        return self._linear.with_sums(given, sums if given.dtype == torch.float32 else sums.to(given.dtype), wanted)
