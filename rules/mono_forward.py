"""Mono-Forward (Gong, Li and Abdulla, "Mono-Forward: backpropagation-free algorithm for efficient neural network
training harnessing local errors", arXiv 2501.09238, 2025).

A layer's goodness for every class is a trained projection of all its activations, G = a M^T with M [n, features]. Block
and M learn from the cross-entropy of G.
"""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import HeadResult
from unlocked.rules.base import HeadArguments, LayerInfo, LocalRule

__all__ = ["MonoForward"]


class MonoForward(LocalRule):
    """Level 1.

    Args:
        sums: the run predicts by the sum of the layers' goodness (a running read-out); else by the output layer, which
            the paper calls prediction of the type of backpropagation.
    """

    takes = ("classification",)

    def __init__(self, layer: LayerInfo, *, sums: bool = False) -> None:
        super().__init__(layer)
        bound = 1 / sqrt(layer.num_features)  # as torch's linear layers begin
        values = torch.rand(layer.num_classes, layer.num_features, generator=layer.generator())
        self.projection = nn.Parameter(values.mul_(2 * bound).sub_(bound))
        self.read_out = 1.0 if sums else None
        self._in_closed_form = len(layer.activation_shape) == 1 and layer.latent_size == layer.num_features

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(activations), labels)

    def scores(self, activations: Tensor) -> Tensor:
        """G [B, n]."""
        return activations.flatten(1) @ self.projection.T

    def head_arguments(self) -> HeadArguments | None:
        """Where the latents are all activations, as in linear layers, G is a head with a trained basis."""
        return HeadArguments(self.projection, None, False, 1.0, 0.0, True) if self._in_closed_form else None

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        assert result.basis_grad is not None
        return [result.basis_grad]
