"""The best weights are those of the whole run's best evaluation, whichever figure ranks, and however it was cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from task_runs import train

from unlocked.runtime.metrics.best import BestWeights
from unlocked.runtime.metrics.records import EpochResult, RunInfo

RANKED = {"regression": ("loss", False), "tokens": ("loss", False), "multi-label": ("micro_f1", True)}
SECOND = {"regression": 30.0, "tokens": 30.0, "multi-label": 0.3}
"""Factors of the learning rate at which the second epoch is worse than the first."""


def _run(case: str, folder: Path, **options: Any) -> Any:
    _, result = train(case, "sequential", best_dir=folder, lr_factor={0: 1.0, 1: SECOND[case]}.__getitem__, **options)
    return result


@pytest.mark.parametrize("older", [False, True], ids=["", "as an earlier release left it"])
@pytest.mark.parametrize("case", RANKED)
def test_a_resumed_run_keeps_the_best_of_its_earlier_part(case: str, older: bool, tmp_path: Path) -> None:
    whole, cut, record = tmp_path / "whole", tmp_path / "cut", tmp_path / "cut" / "best.json"
    figure, more = RANKED[case]
    epochs = _run(case, whole).epochs
    found = [epoch.figure(figure) for epoch in epochs]
    assert found.index((max if more else min)(found)) == 0, "else this run shows nothing"
    assert found[0] != found[1]
    saved = {"snapshot_dir": tmp_path / "saved", "snapshot_every": 8}
    _run(case, cut, max_steps=8, **saved)  # of 6 and 6
    kept = json.loads(record.read_text())
    assert (kept["epoch"], kept["figure"], kept["more_is_better"]) == (0, figure, more)
    assert kept[f"test_{figure}"] == found[0]
    if older:
        record.write_text(json.dumps({key: kept[key] for key in kept if key not in ("figure", "more_is_better")}))
    _run(case, cut, resume=tmp_path / "saved", **saved)
    assert json.loads(record.read_text())["epoch"] == 0
    expected, got = (torch.load(folder / "model_best.pt", weights_only=True) for folder in (whole, cut))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert not list(cut.glob("candidate-*"))


def _info(best: tuple[str, bool]) -> RunInfo:
    sizes = {"total": 4, "epochs": 2, "steps_per_epoch": 2, "batch_size": 8}
    return RunInfo(model="m", dataset="d", engine="sequential", rule="LLS", stages=(("a",),), best=best, **sizes)


def _epoch(number: int, loss: float, **figures: float) -> EpochResult:
    none = dict.fromkeys(("train_acc1", "train_acc5", "eval_acc1", "eval_acc5"))
    others: Any = {**none, "eval_figures": tuple(figures.items()), "local_losses": (), "seconds": 1.0}
    return EpochResult(epoch=number, train_loss=1.0, eval_loss=loss, **others)


def test_a_loss_of_zero_is_the_best_of_all(tmp_path: Path) -> None:
    first = BestWeights(tmp_path)
    first.on_start(_info(("loss", False)))
    (tmp_path / "candidate-00000").mkdir()
    first.on_epoch(_epoch(0, 0.0))
    second = BestWeights(tmp_path, 1)
    second.on_start(_info(("loss", False)))
    second.on_epoch(_epoch(1, 0.5))
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 0


@pytest.mark.parametrize("now", [("micro_f1", True), ("loss", True)])
def test_the_best_by_another_figure_is_refused(now: tuple[str, bool], tmp_path: Path) -> None:
    first = BestWeights(tmp_path)
    first.on_start(_info(("loss", False)))
    (tmp_path / "candidate-00000").mkdir()
    first.on_epoch(_epoch(0, 0.5, micro_f1=50.0))
    second = BestWeights(tmp_path, 1)
    with pytest.raises(ValueError, match=rf"best epoch by loss \(less is better\), this run ranks by {now[0]} \(more"):
        second.on_start(_info(now))
    BestWeights(tmp_path).on_start(_info(now))  # a run that begins has no part in what was there
