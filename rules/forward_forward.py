"""Forward-Forward (Hinton, "The forward-forward algorithm: some preliminary investigations", arXiv 2212.13345, 2022).

Labels are laid over the data. A layer's goodness of a row is the mean square of its activations; it learns to have more
of it than a threshold for right labels, and less for wrong ones. A class is predicted by the goodness, summed over all
layers but the first (of one alone, by its), of the sample with that class's label laid over it.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Draw, LayerPass, Views

__all__ = ["ForwardForward", "LabelOverlay", "goodness"]


@dataclass(frozen=True)
class LabelOverlay(Views):
    """The first n pixels of every channel, or the first n numbers of a flat sample, say the label: `amplitude` at its
    place, 0 elsewhere, or amplitude / n everywhere for no label (neutral).

    In training: the right label; wrong labels, drawn evenly; neutral. In evaluation every label, then neutral. The
    output layer sees the neutral rows.
    """

    amplitude: float = 1.0

    def check(self, sample: Tensor, num_classes: int) -> None:
        room = prod(sample.shape[1:]) if sample.dim() == 3 else sample.shape[0]
        if not sample.is_floating_point() or sample.dim() not in (1, 3) or room < num_classes:
            raise ValueError(f"labels of {num_classes} classes are laid over images or vectors with room for as many")
        if num_classes < 2:
            raise ValueError("one class has no wrong label")

    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        rows = [self.overlay(samples, F.one_hot(labels, num_classes))]
        uniform = draw(self.train - 2)
        for k in range(self.train - 2):
            shift = 1 + (uniform[:, k] * (num_classes - 1)).long().clamp_max(num_classes - 2)
            rows.append(self.overlay(samples, F.one_hot((labels + shift) % num_classes, num_classes)))
        return torch.cat([*rows, self._neutral(samples, num_classes)])

    def make_evaluation(self, samples: Tensor, num_classes: int) -> Tensor:
        every = torch.eye(num_classes, device=samples.device)
        rows = [self.overlay(samples, one.expand(len(samples), -1)) for one in every]
        return torch.cat([*rows, self._neutral(samples, num_classes)])

    def overlay(self, samples: Tensor, marks: Tensor) -> Tensor:
        """[B, ...] with `amplitude` times the marks [B, n] in the first places."""
        flat = samples.flatten(2) if samples.dim() == 4 else samples[:, None]
        marks = (self.amplitude * marks).to(samples.dtype)[:, None].expand(-1, flat.shape[1], -1)
        return torch.cat([marks, flat[:, :, marks.shape[2] :]], 2).view(samples.shape)

    def _neutral(self, samples: Tensor, num_classes: int) -> Tensor:
        return self.overlay(samples, torch.full((len(samples), num_classes), 1 / num_classes, device=samples.device))


class ForwardForward(LocalRule):
    """Level 3: views, scores and a read-out over the layers.

    The next layer must not read the goodness off its input: put a normalisation per sample between the layers.

    Args:
        threshold: of the goodness.
        negatives: wrong labels per sample; each layer learns from its hardest, the one with the most goodness.
        amplitude: of the labels in the data.
    """

    takes = ("classification",)

    def __init__(self, layer: LayerInfo, *, threshold: float = 1.0, negatives: int = 1, amplitude: float = 1.0) -> None:
        super().__init__(layer)
        if negatives < 1:
            raise ValueError(f"negatives is {negatives}; a layer needs at least one wrong label to learn from")
        self.threshold, self.num_classes = threshold, layer.num_classes
        self.views = LabelOverlay(2 + negatives, layer.num_classes + 1, -1, amplitude)
        self.read_out = 1.0 if layer.index or not layer.following_shapes else 0.0  # an only layer speaks for itself

    def step(self, layer_pass: LayerPass) -> Tensor:
        """softplus(threshold - g+) + softplus(g- - threshold), the mean over the samples."""
        of_rows = goodness(layer_pass.activations).view(-1, len(layer_pass.labels))
        right, wrong = of_rows[0], of_rows[1:-1].amax(0)
        return (F.softplus(self.threshold - right) + F.softplus(wrong - self.threshold)).mean()

    def scores(self, activations: Tensor) -> Tensor:
        """The goodness of every class [B, n]."""
        return goodness(activations).view(self.num_classes + 1, -1)[:-1].T


def goodness(activations: Tensor) -> Tensor:
    """The mean square of every row's activations, [rows]."""
    return activations.square().mean(tuple(range(1, activations.dim())))
