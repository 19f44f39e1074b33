"""Distance-Forward (Wu et al., "Distance-forward learning: enhancing the forward-forward algorithm towards
high-performance on-chip learning", arXiv 2408.14925, 2024): Forward-Forward as metric learning.

Each class has a centre in the layer's feature space, and goodness is nearness to it: g_c = -|z - m_c|^2 / D. A sample's
own class shall be better than every other by a margin, and the hardest others count most (N-pair margin loss):
log(1 + sum_(c != y) exp((g_c - g_y + margin) / T)). What the layer learns from is one pass without overlaid labels.
"""

from math import inf, isfinite
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.reading import read_latents

__all__ = ["DistanceForward"]

Centres = Literal["means", "trained"]


class DistanceForward(LocalRule):
    """Level 1 with scores; with `sums` the run predicts by the layers' summed goodness.

    Args:
        margin: by how much the own class shall be nearer.
        temperature: T; the smaller, the more the hardest other class counts alone. docs/rules.md says why 0.1.
        sums: predict by the sum over the layers.
        centres: "means", the classes' running means; or "trained" with the layer. Both begin at keyed normal values.
        momentum: of the running means: how much of the old one stays after a micro-batch that has the class.
    """

    takes = ("classification",)

    centres: Tensor

    def __init__(
        self,
        layer: LayerInfo,
        *,
        margin: float = 1.0,
        temperature: float = 0.1,
        sums: bool = False,
        centres: Centres = "means",
        momentum: float = 0.9,
    ) -> None:
        super().__init__(layer)
        if not 0 < temperature < inf or not isfinite(margin):
            raise ValueError(
                f"temperature is {temperature!r} and margin {margin!r}; give finite numbers, the first above 0"
            )
        if centres not in get_args(Centres):
            raise ValueError(f"centres is {centres!r}; valid: {', '.join(get_args(Centres))}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum!r}; it must lie in [0, 1)")
        self.margin, self.temperature, self.momentum = margin, temperature, momentum
        self.latent_size, self.layout = layer.latent_size, layer.layout
        start = torch.randn(layer.num_classes, layer.num_latents, generator=layer.generator())
        self.are_trained = centres == "trained"
        if self.are_trained:
            self.centres = nn.Parameter(start)
        else:
            self.register_buffer("centres", start)
        self.read_out = 1.0 if sums else None

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        features = self._features(activations)
        nearness = self._nearness(features)
        own = F.one_hot(labels, nearness.shape[1]).bool()
        excess = (nearness - nearness.gather(1, labels[:, None]) + self.margin) / self.temperature
        loss = F.softplus(excess.masked_fill(own, float("-inf")).logsumexp(1)).mean()
        if not self.are_trained:
            self._move_centres(features.detach(), own)
        return loss

    def scores(self, activations: Tensor) -> Tensor:
        """Minus the mean squared distance to every centre, [B, n]; features have length sqrt(D)."""
        return self._nearness(self._features(activations))

    def _features(self, activations: Tensor) -> Tensor:
        z = read_latents(activations, self.latent_size, self.layout)
        return F.normalize(z, dim=1, eps=1e-8) * z.shape[1] ** 0.5

    def _nearness(self, features: Tensor) -> Tensor:
        # A copy: what autograd keeps must not change as the centres move.
        centres = self.centres if self.are_trained else self.centres.clone()
        return -(features[:, None] - centres).square().mean(2)

    @torch.no_grad()
    def _move_centres(self, features: Tensor, own: Tensor) -> None:
        members = own.to(features.dtype)
        count = members.sum(0)[:, None]
        means = members.T @ features / count.clamp_min(1)
        self.centres.lerp_(means, (1 - self.momentum) * (count > 0).to(features.dtype))
