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


KINDS: list[Callable[[], nn.Module]] = [PreActivation, Functional, Named, Deciding, Frozen]


def main() -> None:
    x = image(16, 6, 6)
    assert not x.is_contiguous()
    for kind in KINDS:
        for rule in (None, Probe):
            closed: type = OpenStep if rule else FusedStep
            steps: list[tuple[Any, type]] = [(None, AutogradStep), (cpp, closed), (reference, closed)]
            for backend, step in steps[:1] if kind is Deciding else steps:
                assert_close_to_float64(seeded(kind, latent_size=2), x, backend, rule=rule, kind=step)
                print(kind.__name__, step.__name__, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
