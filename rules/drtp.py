"""DRTP: direct random target projection (Frenkel, Lefebvre and Bol, "Learning without feedback: fixed random learning
signals allow for feedforward training of deep neural networks", Frontiers in Neuroscience 15, 2021, 629892).

A layer's error signal is its labels, one-hot, projected through a fixed random matrix straight to its activations. It
needs nothing from later layers, so it is local and feed-forward, and pipelines as the LLS family does.
"""

from math import sqrt

import torch
from torch import Tensor

from unlocked.rules.base import LayerInfo, LocalRule

__all__ = ["DRTP", "random_projection"]


def random_projection(layer: LayerInfo) -> Tensor:
    """B [num_classes, num_features], keyed by (seed, layer): uniform within sqrt(6 / num_features).

    That is He's uniform distribution (ICCV 2015) for num_features inputs, which Frenkel et al. draw from.
    """
    bound = sqrt(6 / layer.num_features)
    values = torch.rand(layer.num_classes, layer.num_features, generator=layer.generator())
    return values.mul_(2 * bound).sub_(bound)


class DRTP(LocalRule):
    """The gradient at the activations a [B, ...] is B[y] / batch, whatever a is.

    There is no loss that is minimised, but there is one whose gradient this is: the mean over the batch of the inner
    product <a, B[y]>, which `forward` returns and a run reports as the layer's local loss. It starts near 0, falls as
    the activations turn against their class's random target, and may be negative. The published update sums over the
    batch; the mean, as in all other rules here, keeps the learning rate independent of the batch size.

    B is a buffer that is never saved: (seed, layer) gives it again.
    """

    takes = ("classification",)

    projection: Tensor

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.register_buffer("projection", random_projection(layer), persistent=False)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return (activations.flatten(1) * self.projection[labels]).sum(1).mean()
