"""Blocks that begin with GroupNorm, of images whose gradient nobody wants, trained for a step: prints each one's name.

A script, since torch ends the process where this goes wrong."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from graph_blocks import Probe, assert_close_to_float64, image, seeded
from torch import Tensor, nn

from unlocked.kernels import cpp, reference
from unlocked.workers.fused import FusedStep
from unlocked.workers.layer import AutogradStep
from unlocked.workers.open_step import OpenStep


class PreActivation(nn.Module):
    """x + conv(relu(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.norm(x)))


class Functional(PreActivation):
    """The same with the function, which no module tells of."""

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm.weight, self.norm.bias
        return x + self.conv(F.relu(F.group_norm(x, 4, weight=scale, bias=shift)))


class Named(Functional):
    """With every argument by its name."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(input=x, num_groups=4, weight=self.norm.weight, bias=self.norm.bias)
        return x + self.conv(F.relu(y))


class Deciding(PreActivation):
    """Can't be traced: autograd has the whole of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


class Frozen(PreActivation):
    """What comes before the norm does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


class OneChannel(nn.Sequential):
    """Of grey images: their strides are those of channels-last ones, and contiguous too."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(1, 1), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())


class OnePixel(nn.Sequential):
    """Of images that are one pixel, likewise."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(4, 256), nn.Conv2d(256, 8, 3, padding=1), nn.ReLU())


KINDS: list[Callable[[], nn.Module]] = [PreActivation, Functional, Named, Deciding, Frozen, OneChannel, OnePixel]


def channels_last(*shape: int) -> Tensor:
    """An image whose strides say so whatever its sizes."""
    channels, height, width = shape
    strides = (channels * height * width, 1, width * channels, channels)
    return torch.empty_strided((6, *shape), strides).copy_(image(*shape))


def main() -> None:
    plain, one_channel, one_pixel = channels_last(16, 6, 6), channels_last(1, 24, 24), channels_last(256, 1, 1)
    assert [x.is_contiguous() for x in (plain, one_channel, one_pixel)] == [False, True, True]
    for kind in KINDS:
        x = {OneChannel: one_channel, OnePixel: one_pixel}.get(kind, plain)
        make = seeded(kind, latent_size=1 if kind is OnePixel else 2)
        for rule in (None, Probe):
            closed: type = OpenStep if rule else FusedStep
            steps: list[tuple[Any, type]] = [(None, AutogradStep), (cpp, closed), (reference, closed)]
            for backend, step in steps[:1] if kind is Deciding else steps:
                assert_close_to_float64(make, x, backend, rule=rule, kind=step)
                print(kind.__name__, step.__name__, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
