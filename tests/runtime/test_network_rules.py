"""Rules that don't fit are refused before a run begins; and rules one per layer."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.rules import DRTP, LLS, LayerInfo, LLS_MxM_reduced, LLSConfig, LocalLosses, LocalRule
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.network import build_network
from unlocked.runtime.rule_trial import check_rules

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 30), nn.ReLU()), nn.Sequential(nn.Linear(30, 24), nn.Tanh()), nn.Linear(24, 3)
    )


def _fit(rule: Any, network: Any = None, data: Any = (X, LABELS), **options: Any) -> RunResult:
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    return Trainer(network or _network(), rule=rule, optimizer=optimizer, **options).fit(data, epochs=2, batch_size=8)


class ConvolutionalHead(LocalRule):
    """A rule that only fits images."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.conv = nn.Conv2d(layer.activation_shape[0], layer.num_classes, 3)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.conv(activations).mean((2, 3)), labels)


class Detached(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.detach().mean() + self.bias


class PerSample(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.flatten(1).mean(1)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ([LLS()], ["1 rules for 2 local layers", "one per layer"]),
        ([LLS()] * 3, ["3 rules for 2 local layers"]),
        ([LLS(), ConvolutionalHead], ["rule ConvolutionalHead", "layer sequential2", "(24,)"]),
        (Detached, ["rule Detached", "layer sequential1", "does not depend on the activations"]),
        (PerSample, ["layer sequential1", "shape (2,)", "scalar"]),
        (lambda info: 3, ["layer sequential1", "makes a int"]),
    ],
)
def test_what_does_not_fit_is_named(rule: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="rule") as caught:
        _fit(rule)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_a_basis_with_more_rows_than_latents() -> None:
    """The default of 20 rows fits the layers of 30 and 24 activations, but not one of 12."""
    network = nn.Sequential(nn.Linear(6, 30), nn.Linear(30, 12), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"LLS_MxM_reduced.* layer linear2 .*20 rows.*12 latents.*at most 12"):
        _fit(LLS_MxM_reduced(), network)
    _fit(LLS_MxM_reduced())


def test_images_only() -> None:
    """Token sequences [B, T, D] for a rule that convolves."""
    network = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Flatten(), nn.Linear(32, 3)))
    tokens = (torch.randn(24, 4, 6), LABELS)
    with pytest.raises(ValueError, match=r"ConvolutionalHead does not fit layer linear1 .*\(4, 8\)"):
        _fit(ConvolutionalHead, network, tokens)
    assert _fit(DRTP, network, tokens).steps == 6


def test_one_rule_per_layer_trains_each_by_its_own() -> None:
    mixed = _fit([LLS(), LocalLosses()])
    assert "sequential2.rule.feedback" in mixed.weights
    assert "sequential1.rule.feedback" not in mixed.weights
    # The first layer depends on nothing but its own rule.
    alone = _fit(LLS())
    same = {name: torch.equal(value, mixed.weights[name]) for name, value in alone.weights.items()}
    assert same == {name: "sequential1" in name for name in same}
    assert _fit([LLS(), LocalLosses()], engine="streams").weights_sha256 == mixed.weights_sha256


class Drawn(LLSConfig):
    """Built from the global generator, unlike ours."""

    def __call__(self, layer: LayerInfo) -> LocalRule:
        torch.rand(1)
        return LLS()(layer)


def test_the_check_leaves_no_trace() -> None:
    network = build_network(_network(), input_shape=(6,), num_classes=3, seed=0)
    state = torch.get_rng_state()
    check_rules(network, Drawn())
    assert torch.equal(torch.get_rng_state(), state)


def test_drtp_reports_an_inner_product_that_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(_network(), rule=DRTP, optimizer=partial(torch.optim.Adam, lr=1e-2))
    result = trainer.fit((X, LABELS), epochs=12, batch_size=8)
    first, last = (dict(epoch.local_losses) for epoch in (result.epochs[0], result.epochs[-1]))
    assert all(last[name] < first[name] for name in last)
    assert last["sequential1"] < 0
