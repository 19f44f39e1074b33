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
from torch import Tensor, nn

from unlocked.workers.graph.operations import Gradients, Operation, trained
from unlocked.workers.graph.products import bias_gradient, product, weight_gradient
from unlocked.workers.graph.shapes import is_size
from unlocked.workers.graph.tracing import Node

__all__ = ["ScaledLinear", "Standardized", "readers_of"]


def readers_of(norm: Node) -> list[Node]:
    """The products that read what `norm`, a LayerNorm of the block's input, gives; empty: it is read by others too, or
    one of them has a frozen weight."""
    module = norm.target
    if norm.kind is not nn.LayerNorm or module.weight is None or not (module.weight.requires_grad):
        return []
    plain = len(module.normalized_shape) == 1 and (module.bias is None or module.bias.requires_grad)
    readers = [user for user in norm.users if not is_size(user)]
    products = [user.kind is nn.Linear and user.target.weight.requires_grad for user in readers]
    return readers if plain and all(products) else []


class Standardized(Operation):
    """The library's LayerNorm without scale and shift; nothing goes back through it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._shape, self._eps = list(norm.normalized_shape), norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return torch.layer_norm(x, self._shape, None, None, self._eps)


class ScaledLinear(Operation):
    """A product whose weight has taken in the scale and shift of the norm before it."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        self._weight, self._bias = linear.weight, linear.bias
        self._scale, self._shift = cast(Tensor, norm.weight), norm.bias
        self.parameters = trained(self._weight, self._bias, self._scale, self._shift)

    def forward(self, z: Tensor) -> Tensor:
        """[..., D_in] -> [..., D]."""
        self._z = z
        bias: Tensor | None = self._bias
        if self._shift is not None:
            bias = torch.mv(self._weight, self._shift) if bias is None else torch.addmv(bias, self._weight, self._shift)
        return product(z, self._weight * self._scale, bias)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        outer, sums = weight_gradient(grad, self._z), bias_gradient(grad)
        del self._z
        of_scale = (self._weight * outer).sum(0)
        of_weight = outer.mul_(self._scale)
        if self._shift is not None:
            of_weight.addr_(sums, self._shift)
        grads = [of_weight]
        if self._bias is not None and self._bias.requires_grad:
            grads.append(sums)
        grads.append(of_scale)
        if self._shift is not None:
            grads.append(torch.mv(self._weight.T, sums))
        return [None], grads
