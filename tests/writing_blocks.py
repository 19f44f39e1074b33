"""Runs of networks whose blocks write into what they are given, as in-place activations in front of a block do."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import Block
from unlocked.rules import LLS, Carried, LayerPass, LocalRule
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.job import Engine

__all__ = ["CASES", "Own", "RuleOfInput", "train"]

WIDTH, CLASSES = 6, 4


class Own(nn.Module):
    """Adds to its input where it lies, in training and evaluation; torch.fx can't follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x.add_(0.1)
        if bool((x > 1e6).all()):
            x.zero_()
        y: Tensor = self.conv(F.leaky_relu_(x, 0.3))
        return y


class Masked(nn.Module):
    """Doubles a named tensor where it lies, which the next layer reads as well."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*body)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        scale.mul_(2.0)
        y: Tensor = self.inner(x * scale[:, : x.shape[1], None, None])
        return y


class RuleOfInput(LocalRule):
    """Reads the layer's input, which may be what the layer before carries as well, and does its forward again."""

    carries: ClassVar = {"seen": Carried((WIDTH, 6, 6))}
    receives = ("seen",)

    def carry(self, layer_pass: LayerPass) -> Mapping[str, Tensor]:
        return {"seen": layer_pass.activations.detach()}

    def step(self, layer_pass: LayerPass) -> Tensor:
        again = layer_pass.forward(layer_pass.input)
        pooled = (layer_pass.activations + again).mean((2, 3))[:, :CLASSES]
        seen = layer_pass.carried.get("seen", layer_pass.activations)
        assert seen is not None
        return F.cross_entropy(pooled, layer_pass.labels) + (layer_pass.input * seen * layer_pass.activations).mean()


def _blocks(second: nn.Module, third: nn.Module | None = None, first: nn.Module | None = None) -> list[nn.Module]:
    if first is None:
        first = nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH))
    ending = [nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES)]
    third = nn.Sequential(*ending) if third is None else third
    return [Block("first", first), Block("second", second), Block("third", third, is_output=True)]


def _beginning(*begin: nn.Module) -> list[nn.Module]:
    return _blocks(nn.Sequential(*begin, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU()))


def _masked() -> list[nn.Module]:
    end = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, CLASSES)]
    return _blocks(Masked(nn.Conv2d(WIDTH, WIDTH, 3, padding=1)), Masked(*end), Masked(nn.Conv2d(1, WIDTH, 3)))


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "leaky ReLU": lambda: {"model": _beginning(nn.LeakyReLU(0.3, inplace=True)), "rule": LLS()},
    "SiLU": lambda: {"model": _beginning(nn.SiLU(inplace=True)), "rule": LLS(), "kernels": "torch"},
    "RReLU": lambda: {"model": _beginning(nn.RReLU(inplace=True)), "rule": LLS()},
    "a forward of one's own": lambda: {"model": _blocks(Own()), "rule": LLS()},
    "a rule of passes": lambda: {"model": _blocks(Own()), "rule": RuleOfInput},
    "a named tensor": lambda: {"model": _masked(), "rule": LLS()},
}


def _data(count: int, seed: int, *, named: bool) -> Any:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 6, 6, generator=generator)
    labels = torch.arange(count) % CLASSES
    if not named:
        return images, labels
    return {"input": images, "scale": torch.rand(count, WIDTH, generator=generator), "labels": labels}


def train(
    name: str, engine: Engine | str, *, max_steps: int | None = None, **options: Any
) -> tuple[Trainer, RunResult]:
    """Two epochs of 6 micro-batches, the last one smaller."""
    torch.manual_seed(1)
    optimizer, named = partial(torch.optim.Adam, lr=1e-2), name == "a named tensor"
    options = {**CASES[name](), "seed": 4, "threads": 1, "statistics_batches": 2, **options}
    trainer = Trainer(optimizer=optimizer, engine=engine, **options)
    data = {"batch_size": 8, "eval_data": _data(7, 2, named=named), "eval_batch_size": 4, "max_steps": max_steps}
    return trainer, trainer.fit(_data(43, 1, named=named), epochs=2, **data)
