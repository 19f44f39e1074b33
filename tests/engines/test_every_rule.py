"""Laws 1 and locality for every local rule there is: any placement, any resume, and no way from later layers back.

Over several processes: tests/launch/test_every_rule_of_processes.py.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.rules import LOCAL_RULES, LayerInfo, LayerPass, LocalRule, get_rule
from unlocked.runtime import RunResult, Streams
from unlocked.runtime.conformance import Check, check_conformance, leaks, train_small


def figures(result: RunResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(e).items() if k != "seconds"} for e in result.epochs]


@pytest.mark.parametrize("name", LOCAL_RULES)
def test_placement_and_resume(name: str, tmp_path: Path) -> None:
    """Three stages, whose snapshot in the middle of the second epoch goes on in two and in one."""
    rule = get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    expected = train_small(rule)
    assert all(value.isfinite().all() for value in expected.weights.values())
    saving: dict[str, Any] = {"snapshot_every": 7, "snapshot_dir": tmp_path}
    placed = train_small(rule, Streams(stages=3, queue_depth=2, graph_ticks=2), **saving)
    assert placed.weights_sha256 == expected.weights_sha256
    assert figures(placed) == figures(expected)
    for engine in (Streams(stages=2), "sequential"):
        resumed = train_small(rule, engine, resume=tmp_path / "step-00000007", **saving)
        assert resumed.weights_sha256 == expected.weights_sha256
        assert figures(resumed) == figures(expected)[1:]


@pytest.mark.parametrize("name", LOCAL_RULES)
def test_no_later_layer_reaches_an_earlier_one(name: str) -> None:
    assert leaks(get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")) == []


class Leaking(LocalRule):
    """Layers meet behind the framework's back: each wants its mean to be that of whichever layer came last."""

    last: ClassVar[Tensor] = torch.zeros(())

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        loss = F.mse_loss(activations.mean(), Leaking.last)
        Leaking.last = activations.detach().mean()
        return loss


class Counting(LocalRule):
    """Keeps its state where nobody saves it."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.steps = 0

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        self.steps += 1
        return activations.square().mean() * self.steps


class Drawing(LocalRule):
    """Reads a generator that no key reaches."""

    source: ClassVar[torch.Generator] = torch.Generator()

    def step(self, layer_pass: LayerPass) -> Tensor:
        return (layer_pass.activations * torch.rand((), generator=Drawing.source)).mean()


class Lost(LocalRule):
    def step(self, layer_pass: LayerPass) -> Tensor:
        return layer_pass.carried["scores"].mean()


@pytest.mark.parametrize(
    ("rule", "failing"),
    [(Leaking, "exact"), (Leaking, "local"), (Counting, "resumable"), (Drawing, "deterministic"), (Lost, "fits")],
)
def test_a_check_finds_what_it_is_for(rule: Any, failing: str) -> None:
    Leaking.last = torch.zeros(())
    failed = {check.name for check in check_conformance(rule) if not check.passed}
    assert failing in failed


def test_a_rule_that_keeps_to_itself_passes_all_checks() -> None:
    rule = get_rule("TaskAndConsistency", temperature=0.5, label_smoothing=0.0, waveform="cosine")
    checks = list(check_conformance(rule))
    assert all(check.passed for check in checks), checks
    assert [check.name for check in checks] == ["fits", "deterministic", "exact", "resumable", "local", "cost"]
    assert isinstance(checks[0], Check)
