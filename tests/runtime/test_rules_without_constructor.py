"""A rule is what it says it is: a class with a `forward`, and nothing else if it needs nothing else."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import RunResult, Trainer

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


def _fit(rule: Any) -> RunResult:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Sequential(nn.Linear(9, 9)), nn.Linear(9, 3))
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Trainer(network, rule=rule, optimizer=optimizer).fit((X, LABELS), epochs=2, batch_size=8)


def _loss(activations: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(activations[:, :3], labels)


class Bare(LocalRule):
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return _loss(activations, labels)


class Told(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        assert layer.activation_shape == (9,)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return _loss(activations, labels)


class Untold(LocalRule):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return _loss(activations, labels)


class Module(nn.Module):
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return _loss(activations, labels)


class Plain:
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return _loss(activations, labels)


@pytest.mark.parametrize("rule", [Told, Untold, Module, Plain])
def test_a_class_with_a_forward_is_a_rule(rule: Any) -> None:
    assert _fit(rule).weights_sha256 == _fit(Bare).weights_sha256


def test_a_modules_parameters_are_the_rules() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Linear(9, 3)

        def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.scores(activations), labels)

    first, again = _fit(Trained), _fit(Trained)
    assert first.weights_sha256 == again.weights_sha256
    names = [name for name in first.weights if ".rule." in name]
    assert names == [f"sequential{k}.rule.of.scores.{part}" for k in (1, 2) for part in ("weight", "bias")]


def test_a_class_without_a_forward_is_none() -> None:
    class Nothing:
        pass

    with pytest.raises(ValueError, match="the rule of layer sequential1 makes a Nothing; give a LocalRule class"):
        _fit(Nothing)
