"""Blocks with a GroupNorm: before every activation, at the end and inside, of images, rows, features and tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from block_modules import Residual
from torch import nn

__all__ = ["GROUPED"]

Case = tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, ...], bool]
"""What makes a body, the block's options, one sample's shape, and whether something in it is joined."""


def _raised(norm: nn.GroupNorm) -> nn.GroupNorm:
    """Its weight and bias are not those of its start, at which much cancels."""
    for p in (norm.weight, norm.bias):
        p.data.add_(0.5 * torch.randn_like(p))
    return norm


def _net(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), _raised(nn.GroupNorm(4, 20)), *more)


def _with_frozen_weight() -> nn.Sequential:
    net = _net(nn.GELU())
    net[1].weight.requires_grad_(False)
    return net


def _of_rows() -> nn.Sequential:
    first = nn.Conv1d(3, 12, 5, 2, 2), _raised(nn.GroupNorm(4, 12)), nn.SiLU()
    return nn.Sequential(*first, nn.Conv1d(12, 12, 3), _raised(nn.GroupNorm(3, 12)), nn.LeakyReLU(0.1))


def _followed(activation: Callable[[], nn.Module] | None, *more: Callable[[], nn.Module]) -> nn.Sequential:
    return _net(*([] if activation is None else [activation()]), *(make() for make in more))


ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {
    "nothing": None,
    "ReLU": nn.ReLU,
    "leaky ReLU": partial(nn.LeakyReLU, 0.2),
    "SiLU": partial(nn.SiLU, inplace=True),
    "GELU": nn.GELU,
}
IMAGE = (3, 8, 8)
GROUPED: dict[str, Case] = {
    "group": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 3, groups=4)),
        {"latent_size": 2},
        IMAGE,
        True,
    ),
    "group without weights": (
        lambda: nn.Sequential(nn.Conv2d(3, 20, 3), nn.GroupNorm(4, 20, affine=False), nn.SiLU(), nn.Conv2d(20, 8, 3)),
        {"latent_size": 2},
        IMAGE,
        False,
    ),
    "group with a frozen weight": (_with_frozen_weight, {"latent_size": 2}, IMAGE, True),
    "group of rows": (_of_rows, {"latent_size": 2, "layout": "channels_first"}, (3, 24), True),
    "group of features": (
        lambda: nn.Sequential(nn.Linear(12, 20), _raised(nn.GroupNorm(4, 20)), nn.SiLU()),
        {"latent_size": 20},
        (12,),
        True,
    ),
    # Rows that lie otherwise: the library's.
    "group of tokens": (
        lambda: nn.Sequential(nn.Linear(12, 20), _raised(nn.GroupNorm(7, 7)), nn.GELU()),
        {"layout": "tokens"},
        (7, 12),
        True,
    ),
    "group that two read": (
        lambda: _net(Residual(nn.SiLU(), after=nn.ReLU())),
        {"latent_size": 3},
        IMAGE,
        False,
    ),
    "group before another activation": (lambda: _net(nn.Tanh()), {"latent_size": 2}, IMAGE, False),
    **{
        f"group, {name}, inside": (partial(_followed, make, partial(nn.Conv2d, 20, 8, 3)), {}, IMAGE, make is not None)
        for name, make in ACTIVATIONS.items()
    },
    **{
        f"group, {name}, at the end": (partial(_followed, make), {"latent_size": 4}, IMAGE, True)
        for name, make in ACTIVATIONS.items()
    },
    "group with a tail": (lambda: _net(nn.SiLU()), {"latent_size": 2, "tail": nn.MaxPool2d(2)}, IMAGE, True),
    "group, windows that overlap": (lambda: _net(nn.SiLU()), {"latent_size": 3}, IMAGE, True),
}
"""By name, as the cases of `graph_blocks`."""
