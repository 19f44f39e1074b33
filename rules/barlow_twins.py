"""Blockwise Barlow Twins (Siddiqui, Krueger, LeCun and Deny, "Blockwise self-supervised learning at scale", TMLR 2024;
the loss: Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", ICML 2021).

Stage 0 makes two augmented views of every image. Each layer projects both, and their cross-correlation over the
micro-batch is to be the identity: sum (1 - C_ii)^2 + lambda sum C_ij^2. No labels: the output layer, a linear probe
that trains beside it on the first view, tells what was learned.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Draw, LayerPass, Views
from unlocked.rules.reading import read_latents

__all__ = ["BarlowTwins", "TwoViews", "correlation_loss"]

_EPS = 1e-5  # of a variance over the micro-batch, as batch normalisation's


@dataclass(frozen=True)
class TwoViews(Views):
    """Each view is shifted by up to `shift` pixels (what comes in is 0, the mean of normalised images), mirrored with
    probability 1/2, and scaled in contrast and brightness by up to `jitter`. Evaluation sees the image as it is."""

    train: int = 2
    shift: int = 2
    jitter: float = 0.4

    def check(self, sample: Tensor, num_classes: int) -> None:
        if sample.dim() != 3 or not sample.is_floating_point():
            raise ValueError("images are augmented, [C, H, W] of float32")
        if self.shift >= min(sample.shape[1:]):
            raise ValueError(f"a shift of {self.shift} pixels leaves nothing of them")

    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        return torch.cat([self._view(samples, draw(5)) for _ in range(self.train)])

    def _view(self, images: Tensor, uniform: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        side = 2 * self.shift + 1
        down, right = ((uniform[:, i] * side).long().clamp_max(side - 1) for i in (0, 1))
        padded = nn.functional.pad(images, (self.shift,) * 4)
        rows = down[:, None] + torch.arange(height, device=images.device)
        columns = right[:, None] + torch.arange(width, device=images.device)
        columns = torch.where(uniform[:, 2:3] < 0.5, columns.flip(1), columns)
        index = torch.arange(batch, device=images.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        contrast, brightness = (self.jitter * (2 * uniform[:, i] - 1) for i in (3, 4))
        return moved * (1 + contrast)[:, None, None, None] + brightness[:, None, None, None]


class BarlowTwins(LocalRule):
    """Level 3: two keyed views. Maps are read by a pointwise convolution, BatchNorm and ReLU, and their means by the
    projector, a linear layer, BatchNorm, ReLU, and another; other activations by the projector alone.

    Args:
        width: of the convolution, of the projector's hidden layer and output.
        redundancy: lambda.
    """

    def __init__(
        self, layer: LayerInfo, *, width: int = 128, redundancy: float = 5e-3, views: Views | None = None
    ) -> None:
        super().__init__(layer)
        if width < 1:
            raise ValueError(f"width is {width}; the projector's layers have at least 1 neuron")
        self.redundancy, self.latent_size, self.layout = redundancy, layer.latent_size, layer.layout
        self.views = TwoViews() if views is None else views
        self.expansion: nn.Module | None = None
        size = width
        if len(layer.activation_shape) == 3:
            conv = nn.Conv2d(layer.activation_shape[0], width, 1, bias=False)
            self.expansion = nn.Sequential(
                conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        else:
            size = layer.num_latents
        self.projector = nn.Sequential(
            nn.Linear(size, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
        )

    def step(self, layer_pass: LayerPass) -> Tensor:
        a = layer_pass.activations
        read = read_latents(a, self.latent_size, self.layout) if self.expansion is None else self.expansion(a)
        first, second = self.projector(read).chunk(2)
        return correlation_loss(first, second, self.redundancy)


def correlation_loss(first: Tensor, second: Tensor, redundancy: float) -> Tensor:
    """sum (1 - C_ii)^2 + redundancy * sum of C_ij^2, over the D features: C [D, D] is the correlation of [B, D] and
    [B, D] over the batch. Divided by D, so that the learning rate does not depend on it."""
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + _EPS).sqrt() for x in (first, second))
    c = a.T @ b / len(a)
    on = c.diagonal()
    return ((1 - on).square().sum() + redundancy * (c.square().sum() - on.square().sum())) / len(c)
