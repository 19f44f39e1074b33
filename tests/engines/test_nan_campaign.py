"""A value that is not a number, whichever way it comes into a run: never the best, never saved, never a good end."""

import json
import re
from pathlib import Path

import pytest
import torch
from nan_worker import WAYS, check_what_is_left, run

from unlocked.runtime.metrics.best import BestWeights
from unlocked.runtime.metrics.records import EpochResult
from unlocked.runtime.saving.snapshots import find_snapshot


@pytest.mark.parametrize("engine", ["sequential", "streams"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", WAYS)
def test_it_ends_the_run_with_epoch_and_cause(way: str, value: float, engine: str, tmp_path: Path) -> None:
    pattern = WAYS[way][1].replace("E ", "epoch ")
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run(engine, way, value, tmp_path)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    check_what_is_left(tmp_path)


@pytest.mark.parametrize("rule", ["BP", "DFA"])
@pytest.mark.parametrize("engine", ["sequential", "streams"])
@pytest.mark.parametrize("way", ["a loader's training sample", "a later layer in mid-epoch", "the evaluation alone",
                                 "the labels' scores in mid-epoch", "the last update"])  # fmt: skip
def test_it_ends_what_local_rules_are_compared_with(way: str, engine: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(engine, way, float("nan"), tmp_path, rule=rule)
    assert re.search(WAYS[way][1].replace("E ", "epoch "), str(caught.value)), str(caught.value)
    check_what_is_left(tmp_path)


def test_the_best_weights_of_before_stay(tmp_path: Path) -> None:
    """The run breaks in its second epoch: what its first one left can be gone on from."""
    with pytest.raises(RuntimeError):
        run("sequential", "a hidden layer in mid-epoch", float("nan"), tmp_path)
    snapshot = find_snapshot(tmp_path / "snapshots")
    assert snapshot.steps >= 4
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record["epoch"] == 0
    assert [path.name for path in (tmp_path / "best").glob("candidate-*")] == ["candidate-00000"]


def epoch(number: int, loss: float, acc1: float) -> EpochResult:
    figures = {"train_loss": 1.0, "train_acc1": 1.0, "train_acc5": 1.0, "eval_acc5": 1.0, "seconds": 1.0}
    return EpochResult(epoch=number, eval_loss=loss, eval_acc1=acc1, local_losses=(), **figures)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_epoch_without_a_finite_loss_is_not_the_best(value: float, tmp_path: Path) -> None:
    sink = BestWeights(tmp_path)
    sink.on_epoch(epoch(0, value, 99.0))
    assert not (tmp_path / "best.json").exists()
    sink.on_epoch(epoch(1, 0.5, 10.0))
    sink.on_epoch(epoch(2, value, 99.0))
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 1


@pytest.mark.parametrize("accuracy", ["NaN", "null", "Infinity"])
def test_a_record_that_is_no_number_is_beaten(accuracy: str, tmp_path: Path) -> None:
    """As an earlier release may have left it."""
    (tmp_path / "best.json").write_text(f'{{"epoch": 0, "test_acc1": {accuracy}, "test_loss": {accuracy}}}')
    torch.save({}, tmp_path / "model_best.pt")
    sink = BestWeights(tmp_path, 1)
    sink.on_epoch(epoch(1, 0.5, 10.0))
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 1
