"""Distance-Forward (Wu et al., "Distance-forward learning: enhancing the forward-forward algorithm towards
high-performance on-chip learning", arXiv 2408.14925, 2024): Forward-Forward as metric learning.

Each class has a centre in the layer's feature space, and goodness is nearness to it: g_c = -|z - m_c|^2 / D. A sample's
own class shall be better than every other by a margin, and the hardest others count most (N-pair margin loss):
log(1 + sum_(c != y) exp((g_c - g_y + margin) / T)). What the layer learns from is one pass without overlaid labels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import pool_latents
from unlocked.rules.base import LayerInfo, LocalRule

__all__ = ["DistanceForward"]


class DistanceForward(LocalRule):
    """Level 1 with scores; with `sums` the run predicts by the layers' summed goodness.

    The paper's centres are fixed patterns or class means; these train with the layer, from keyed normal values.

    Args:
        margin: by how much the own class shall be nearer.
        temperature: T; the smaller, the more the hardest other class counts alone.
        sums: predict by the sum over the layers.
    """

    takes = ("classification",)

    def __init__(self, layer: LayerInfo, *, margin: float = 1.0, temperature: float = 0.5, sums: bool = False) -> None:
        super().__init__(layer)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature!r}; it must be positive")
        self.margin, self.temperature = margin, temperature
        self.latent_size, self.layout = layer.latent_size, layer.layout
        self.centres = nn.Parameter(torch.randn(layer.num_classes, layer.num_latents, generator=layer.generator()))
        self.read_out = 1.0 if sums else None

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        nearness = self.scores(activations)
        own = F.one_hot(labels, nearness.shape[1]).bool()
        excess = (nearness - nearness.gather(1, labels[:, None]) + self.margin) / self.temperature
        return F.softplus(excess.masked_fill(own, float("-inf")).logsumexp(1)).mean()

    def scores(self, activations: Tensor) -> Tensor:
        """Minus the mean squared distance to every centre, [B, n]; features have length sqrt(D)."""
        z = pool_latents(activations, self.latent_size, self.layout)
        z = F.normalize(z, dim=1, eps=1e-8) * z.shape[1] ** 0.5
        return -(z[:, None] - self.centres).square().mean(2)
