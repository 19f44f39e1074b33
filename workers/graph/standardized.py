"""A LayerNorm of the block's input that products alone read, with its scale and shift taken into their weights.

With z the standardised input, gamma and beta the norm's, W and b the product's, G the gradient at its result
y = W (gamma * z + beta) + b:

    y = (W * gamma) z + (b + W beta)
    M = GT z,  s = sum of G's rows
    W' = M * gamma + s betaT,  b' = s,  gamma' = sum of W * M over W's rows,  beta' = WT s

so that nothing of the activations' size goes back through the product: nobody asks for the gradient of the block's
input.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.workers.graph.operations import Gradients, Operation, trained
from unlocked.workers.graph.products import bias_gradient, product, weight_gradient
from unlocked.workers.graph.shapes import is_size
from unlocked.workers.graph.tracing import Node

__all__ = ["ScaledLinear", "ScaledProduct", "Standardized", "readers_of"]


def readers_of(norm: Node) -> list[Node]:
    """The products that read what `norm`, a LayerNorm of the block's input, gives; empty: it is read by others too, or
    one of them has a frozen weight."""
    module = norm.target
    if norm.kind is not nn.LayerNorm or module.weight is None or not (module.weight.requires_grad):
        return []
    plain = len(module.normalized_shape) == 1 and (module.bias is None or module.bias.requires_grad)
    readers = [user for user in norm.users if not is_size(user)]
    return readers if plain and all(_multiplies(user, norm) for user in readers) else []


def _multiplies(user: Node, norm: Node) -> bool:
    """By a weight that trains, a linear layer's or a parameter by itself."""
    if user.kind is F.linear:
        weight = user.args[1] if len(user.args) > 1 else None
        target = weight.target if isinstance(weight, Node) else None
        return user.args[0] is norm and isinstance(target, Tensor) and target.requires_grad
    return user.kind is nn.Linear and bool(user.target.weight.requires_grad)


class Standardized(Operation):
    """The library's LayerNorm without scale and shift; nothing goes back through it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._shape, self._eps = list(norm.normalized_shape), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.layer_norm(x, self._shape, None, None, self._eps)


class ScaledProduct(Operation):
    """A product, of a weight and a bias that are values like others, that takes in the norm's scale and shift."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._scale, self._shift = cast(Tensor, norm.weight), norm.bias
        self.parameters = trained(self._scale, self._shift)

    def forward(self, z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., D_in], [D, D_in] and [D] -> [..., D]."""
        self._z, self._weight = z, weight
        if self._shift is not None:
            bias = torch.mv(weight, self._shift) if bias is None else torch.addmv(bias, weight, self._shift)
        return product(z, weight * self._scale, bias)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        z, weight = self._z, self._weight
        del self._z, self._weight
        outer, sums = weight_gradient(grad, z), bias_gradient(grad)
        of_norm = [(weight * outer).sum(0)]
        of_weight = outer.mul_(self._scale)
        if self._shift is not None:
            of_weight.addr_(sums, self._shift)
            of_norm.append(torch.mv(weight.T, sums))
        return [None, of_weight, sums][: len(wanted)], of_norm


class ScaledLinear(Operation):
    """The same of a linear layer."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        self._product, self._given = ScaledProduct(norm), (linear.weight, linear.bias)
        self._wanted = [False, True, linear.bias is not None and linear.bias.requires_grad]
        self.parameters = [*trained(*self._given), *self._product.parameters]

    def forward(self, z: Tensor) -> Tensor:
        """[..., D_in] -> [..., D]."""
        return self._product.forward(z, *self._given)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        found, of_norm = self._product.backward(grad, self._wanted)
        of_linear = [one for one, is_wanted in zip(found, self._wanted, strict=True) if is_wanted]
        return [None], [*of_linear, *of_norm]
