"""ReduceLROnPlateau inside a run: the same rates wherever layers are placed, and after a resume, with an optimizer of
torch and with a schedule-free one; and what a snapshot refuses to be resumed with."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch

from unlocked import AdamWSF
from unlocked.data.synthetic import load_synthetic
from unlocked.models import small_conv
from unlocked.rules import DRTP, LLS, LLS_M
from unlocked.runtime import MetricsSink, ReduceLROnPlateau, RunResult, Streams, Trainer
from unlocked.runtime.saving.snapshots import snapshot_folder

TRAIN, TEST = load_synthetic(num_train=26, num_test=9, num_classes=4, image_size=8, seed=2)
PLATEAU = ReduceLROnPlateau(factor=0.5, patience=0, threshold=0.05)
OPTIMIZERS: dict[str, Any] = {
    "Adam": partial(torch.optim.Adam, lr=0.05),
    "AdamWSF": partial(AdamWSF, lr=0.05, weight_decay=0.01),
    "AdamWScheduleFree": partial(schedulefree.AdamWScheduleFree, lr=0.05, weight_decay=0.01),
    "SGDSF": partial(schedulefree.SGDScheduleFree, lr=0.5),
}


def _trainer(optimizer: Any = OPTIMIZERS["Adam"], rule: Any = DRTP, **options: Any) -> Trainer:
    settings = {"lr_factor": PLATEAU, "statistics_batches": 1, **options}
    return Trainer(small_conv(3, 4, 8, dropout=0.2), rule=rule, optimizer=optimizer, **settings)


def _fit(trainer: Trainer, **options: Any) -> RunResult:
    return trainer.fit(TRAIN, **{"epochs": 5, "batch_size": 8, "eval_data": TEST, **options})


def _figures(result: RunResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(epoch).items() if k != "seconds"} for epoch in result.epochs]


class Messages(MetricsSink):
    """A sink for what is told to the user."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def _expected_changes(result: RunResult) -> list[int]:
    """Epochs after which torch's own scheduler, fed with the run's test losses, changes the rate."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.05)
    changes = []
    for epoch in result.epochs:
        before = optimizer.param_groups[0]["lr"]
        scheduler.step(epoch.eval_loss)
        if optimizer.param_groups[0]["lr"] != before:
            changes.append(epoch.epoch)
    return changes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_placement_and_every_snapshot_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    optimizer, told = OPTIMIZERS[name], Messages()
    folder = tmp_path / "whole"
    whole = _fit(_trainer(optimizer, snapshot_every=3, snapshot_dir=folder, sinks=[told]))
    changes = _expected_changes(whole)
    assert 0 < len(changes) < 5, "some test losses fall and some do not"
    assert all(f"after epoch {epoch + 1} " in text for epoch, text in zip(changes, told.messages, strict=True))
    assert whole.weights_sha256 != _fit(_trainer(optimizer, lr_factor=lambda epoch: 1.0)).weights_sha256
    for stages, depth in ((2, 1), (5, 3)):
        placed = _fit(
            _trainer(
                optimizer,
                engine=Streams(stages=stages, queue_depth=depth),
                snapshot_every=3,
                snapshot_dir=tmp_path / f"{stages}",
            )
        )
        assert placed.weights_sha256 == whole.weights_sha256
        assert _figures(placed) == _figures(whole)
    for steps, engine in ((3, "streams"), (9, "sequential"), (12, "streams"), (18, "sequential")):
        resume = snapshot_folder(folder, steps)
        again = _fit(
            _trainer(optimizer, engine=engine, snapshot_every=3, snapshot_dir=tmp_path / "again", resume=resume)
        )
        assert again.weights_sha256 == whole.weights_sha256, steps
        assert _figures(again) == _figures(whole)[-len(again.epochs) :]


def test_the_rates_are_those_that_torchs_scheduler_gives() -> None:
    """The run with the schedule against one whose rates are a plain list, made by torch from the same losses."""
    whole = _fit(_trainer())
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.05)
    rates = []
    for epoch in whole.epochs:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch.eval_loss)
    assert len(set(rates)) > 1
    assert _fit(_trainer(lr_factor=rates.__getitem__)).weights_sha256 == whole.weights_sha256


def test_it_needs_evaluation_data() -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs the test loss"):
        _fit(_trainer(), eval_data=None)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots")
    _fit(_trainer(rule=LLS(), snapshot_every=6, snapshot_dir=folder), epochs=2)
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": partial(torch.optim.AdamW, lr=0.05)}, ["optimizer is", "AdamW(amsgrad", "but was", "'Adam("]),
        ({"optimizer": partial(torch.optim.Adam, lr=0.05, eps=1e-5)}, ["eps=1e-05", "eps=1e-08"]),
        ({"optimizer": OPTIMIZERS["AdamWScheduleFree"]}, ["AdamWScheduleFree(", "but was 'Adam("]),
        ({"rule": LLS_M()}, ["rule is", "LLS_M(temperature=0.5,", "but was", "LLS(temperature=0.5,"]),
        ({"rule": LLS(temperature=0.7)}, ["temperature=0.7", "temperature=0.5"]),
        ({"rule": [LLS()] * 4}, ["rule is [", "but was", "LLS("]),
    ],
)
def test_another_optimizer_or_rule_is_refused(options: dict[str, Any], words: list[str], snapshots: Path) -> None:
    settings = {"rule": LLS(), "snapshot_every": 6, "snapshot_dir": snapshots, "resume": snapshots, **options}
    with pytest.raises(ValueError, match="can't resume from") as caught:
        _fit(_trainer(**settings))
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


def test_another_learning_rate_and_schedule_are_taken_from_where_the_run_goes_on(
    snapshots: Path, tmp_path: Path
) -> None:
    """As who lowers the rate of a run that diverges wants it."""
    options: dict[str, Any] = {"rule": LLS(), "snapshot_every": 6, "snapshot_dir": tmp_path}
    options["resume"] = snapshot_folder(snapshots, 6)
    slow = partial(torch.optim.Adam, lr=0.01)
    lower = _fit(_trainer(slow, **options), epochs=2)
    by_factor = _fit(_trainer(lr_factor=lambda epoch: 0.01 / 0.05, **options), epochs=2)
    assert by_factor.weights_sha256 == lower.weights_sha256
    assert lower.weights_sha256 != _fit(_trainer(**options), epochs=2).weights_sha256


def test_the_two_schedule_free_adamws_refuse_each_others_snapshots(tmp_path: Path) -> None:
    names = ("AdamWSF", "AdamWScheduleFree")
    for name in names:
        _fit(_trainer(OPTIMIZERS[name], snapshot_every=3, snapshot_dir=tmp_path / name), epochs=1)
    for made, other in (names, names[::-1]):
        with pytest.raises(ValueError, match=rf"optimizer is '{other}\(.* but was '{made}\("):
            _fit(_trainer(OPTIMIZERS[other], snapshot_every=3, snapshot_dir=tmp_path / made, resume=tmp_path / made))
