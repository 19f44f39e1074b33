"""Local auxiliary networks: a small network after every layer, trained with it on the cross-entropy of its scores.

DGL: Belilovsky, Eickenberg and Oyallon, "Decoupled greedy learning of CNNs", ICML 2020, whose cheap network (MLP-SR)
first lowers the resolution and then computes with pointwise convolutions and an MLP. AugLocal: Ma et al., "Scaling
supervised local learning with augmented auxiliary networks", ICLR 2024, whose network repeats what follows in the
main one: layers of the widths and resolutions of evenly chosen later layers, fewer the deeper the layer lies.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule

__all__ = ["DGL", "AugLocal", "AuxiliaryRule", "chosen_layers"]


class AuxiliaryRule(LocalRule):
    """The task's loss of a local network's scores [B, n]: cross-entropy for classes. Subclasses make `network` of the
    layer's activations; where the task is of positions, of one position's features, ending in a linear layer."""

    takes: Sequence[str] = ("classification", "multi-label", "regression", "own")
    network: nn.Sequential

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.layer = layer

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        task = self.layer.task
        if task.name == "classification":
            return F.cross_entropy(self.network(activations), labels)
        targets = self.layer.targets(labels)
        if not task.dense:
            return task.loss(self.network(activations), targets)
        last = cast(nn.Linear, self.network[-1])
        inner = self.network[:-1](self.layer.latents(activations))
        return task.projected_loss(inner, last.weight, targets, bias=last.bias)

    def scores(self, activations: Tensor) -> Tensor:
        scores: Tensor = self.network(self.layer.latents(activations) if self.layer.task.dense else activations)
        return scores


class DGL(AuxiliaryRule):
    """Level 1. Pools the maps to a quarter of their sides, `layers` pointwise convolutions, pools to 2 x 2, `layers`
    fully connected layers and a linear classifier; BatchNorm and ReLU after each but the last. Activations that are
    no maps go into the fully connected layers as they are; where the task is of positions, each position's features do.

    Args:
        layers: of either kind, at least 1.
        width: of the fully connected layers; None: as many as go in, of flat activations at most 128.
    """

    takes = ("classification", "multi-label", "regression", "tokens", "segmentation", "own")

    def __init__(self, layer: LayerInfo, *, layers: int = 3, width: int | None = None) -> None:
        super().__init__(layer)
        if layers < 1:
            raise ValueError(f"layers is {layers}; the auxiliary network has at least 1")
        if width is not None and width < 1:
            raise ValueError(f"width is {width}; the auxiliary network's layers have at least 1 neuron")
        shape = layer.activation_shape
        parts: list[nn.Module] = []
        size, hidden = layer.num_features, width or min(layer.num_features, 128)
        if layer.task.dense:
            size = layer.num_latents
            hidden = width or size
        elif len(shape) == 3:
            channels, *sides = shape
            quarter = [ceil(side / 4) for side in sides]
            last = [min(2, side) for side in quarter]
            parts.append(nn.AdaptiveAvgPool2d((quarter[0], quarter[1])))
            for _ in range(layers):
                parts += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            parts.append(nn.AdaptiveAvgPool2d((last[0], last[1])))
            size = channels * last[0] * last[1]
            hidden = width or size
        parts.append(nn.Flatten())
        for _ in range(layers):
            parts += [nn.Linear(size, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
            size = hidden
        self.network = nn.Sequential(*parts, nn.Linear(size, layer.num_classes))


class AugLocal(AuxiliaryRule):
    """Level 1. The auxiliary network of a layer has d layers (convolution, BatchNorm, ReLU) and a linear classifier on
    their mean maps; d falls evenly from `most` at the first layer to `least` at the last one that others follow. The
    defaults are the paper's depth of 3 and its pyramid coefficient of 0.5.

    Args:
        most, least: of d, at least 1; never more than layers follow.
    """

    def __init__(self, layer: LayerInfo, *, most: int = 3, least: int = 2) -> None:
        super().__init__(layer)
        if not 1 <= least <= most:
            raise ValueError(f"least is {least} and most {most}; it must be 1 <= least <= most")
        shape, following = layer.activation_shape, layer.following_shapes
        deep = layer.index / max(layer.index + len(following) - 1, 1)
        depth = max(1, round(most - (most - least) * deep))
        parts: list[nn.Module] = []
        for number in chosen_layers(layer.index, len(following), depth):
            module, shape = _layer_between(shape, following[number - layer.index - 1])
            parts.append(module)
        if len(shape) == 3:
            parts.append(nn.AdaptiveAvgPool2d(1))
            shape = shape[:1]
        self.network = nn.Sequential(*parts, nn.Flatten(), nn.Linear(prod(shape), layer.num_classes))


def chosen_layers(index: int, following: int, depth: int) -> list[int]:
    """At most `depth` of the `following` layers after layer `index`, evenly spread and ending in the last."""
    depth = min(depth, following)
    return sorted({round(index + (i + 1) * following / depth) for i in range(depth)})


def _layer_between(before: Sequence[int], after: Sequence[int]) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer from activations of one shape to those of another, as the main network might have it."""
    if len(before) == 3 and len(after) == 3:
        stride = [max(1, round(a / b)) for a, b in zip(before[1:], after[1:], strict=True)]
        conv = nn.Conv2d(before[0], after[0], 3, (stride[0], stride[1]), padding=1, bias=False)
        sides = tuple((side - 1) // step + 1 for side, step in zip(before[1:], stride, strict=True))
        return nn.Sequential(conv, nn.BatchNorm2d(after[0]), nn.ReLU(inplace=True)), (after[0], *sides)
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(before), after[0]), nn.ReLU(inplace=True)), (after[0],)
