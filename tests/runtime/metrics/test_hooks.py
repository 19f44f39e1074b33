"""What a sink may do to its run: stop it, on every engine with the same weights, and tell figures of its own."""

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import dataset, figures, fit, trainer

from unlocked.launch.pipeline import main
from unlocked.runtime import CsvFile, EarlyStopping, MetricsSink
from unlocked.runtime.metrics.records import EpochResult, Metric, RunInfo, StepResult
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.saving.snapshots import find_snapshot

ENGINES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("sequential", {}),
    ("streams", {"stages": 3, "queue_depth": 2}),
)
EPOCH = EpochResult(
    epoch=0,
    train_loss=1.0,
    train_acc1=50.0,
    train_acc5=90.0,
    eval_loss=2.0,
    eval_acc1=40.0,
    eval_acc5=80.0,
    local_losses=(),
    seconds=1.0,  # type: ignore[arg-type]
)


class StopAfter(MetricsSink):
    """Stops after an epoch, at its very end."""

    waits_at_epochs = True

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, result: EpochResult) -> None:
        if result.epoch == self.epoch:
            self.stop(f"enough after {result.epoch}")


@pytest.mark.parametrize(("engine", "options"), ENGINES)
@pytest.mark.parametrize("evaluates", [True, False])
def test_what_is_stopped_after_an_epoch_is_the_shorter_run(
    engine: str, options: Mapping[str, Any], evaluates: bool, tmp_path: Path
) -> None:
    """Bit for bit, although it was to be longer; and it can be gone on with."""
    data, test = dataset(70), dataset(40, "test", augment=False) if evaluates else None
    sizes: dict[str, Any] = {"batch_size": 16, "eval_data": test, "eval_batch_size": 25}
    expected = trainer("sequential").fit(data, epochs=2, **sizes)
    found = trainer(engine, sinks=[StopAfter(1)], snapshot_dir=tmp_path, **options).fit(data, epochs=5, **sizes)
    assert (found.epochs_done, found.steps, found.stopped_by) == (2, 10, None)
    assert found.stop_reason == "enough after 1"
    assert found.weights_sha256 == expected.weights_sha256
    assert figures(found) == figures(expected)
    assert found.figures()["stop_reason"] == "enough after 1"
    assert find_snapshot(tmp_path).steps == 10
    whole = trainer("sequential").fit(data, epochs=3, **sizes)
    assert trainer(engine, resume=tmp_path, **options).fit(data, epochs=3, **sizes).weights_sha256 == (
        whole.weights_sha256
    )


@pytest.mark.alone
def test_processes_stop_where_the_plain_loop_stops(tmp_path: Path) -> None:
    summaries = []
    for engine in (["--engine", "sequential"], ["--stages", "2"]):
        flags = ["--plain", "--lr", "0.05", "--batch-size", "200", "--num-epochs", "60", "--early-stop", "1"]
        command = [sys.executable, "-m", "unlocked", "train", *flags, *engine, "--threads", "1", "--summary", "s.json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "early stop after epoch" in done.stdout.splitlines()[-1]
        summaries.append(json.loads((tmp_path / "s.json").read_text()))
    one, two = summaries
    assert two["engine"] == "processes"
    assert one["epochs"] < 60
    for name in ("epochs", "steps", "weights_sha256", "stop_reason", "stopped_by", "test_loss"):
        assert one[name] == two[name]
    assert one["stop_reason"].startswith(f"early stop after epoch {one['epochs']}: eval_loss was best in epoch")


@pytest.mark.alone
def test_sinks_of_a_script_stop_the_processes_that_it_starts() -> None:
    """They live in this process, the coordinator in another one."""
    data, sizes = dataset(70), {"batch_size": 16}
    expected = trainer("sequential", threads=1).fit(data, epochs=2, **sizes)  # type: ignore[arg-type]
    stopping = trainer("processes", stages=2, threads=1, sinks=[StopAfter(1)])
    found = stopping.fit(data, epochs=50, **sizes)  # type: ignore[arg-type]
    assert (found.epochs_done, found.stop_reason, found.stopped_by) == (2, "enough after 1", None)
    assert found.weights_sha256 == expected.weights_sha256


@pytest.mark.parametrize(("engine", "options"), ENGINES)
def test_a_stop_amid_an_epoch_returns_a_result(engine: str, options: Mapping[str, Any]) -> None:
    class StopSoon(MetricsSink):
        def on_step(self, step: StepResult) -> None:
            self.stop("soon")

    result = fit(trainer(engine, sinks=[StopSoon()], print_freq=3, **options), epochs=50)
    assert result.stop_reason == "soon"
    assert result.is_complete
    assert 3 <= result.steps < 20


def test_what_a_sink_tells_is_heard_by_all(tmp_path: Path) -> None:
    """After the record that it is told in has reached everybody, by the teller too."""
    heard: list[object] = []

    class Gap(MetricsSink):
        def on_epoch(self, result: EpochResult) -> None:
            assert result.eval_loss is not None
            self.tell("gap", result.eval_loss - result.train_loss, epoch=result.epoch)
            heard.append(("first", result.epoch))

        def on_metric(self, metric: Metric) -> None:
            heard.append((metric.name, metric.epoch))

    class Last(MetricsSink):
        def on_epoch(self, result: EpochResult) -> None:
            heard.append(("last", result.epoch))

    result = fit(trainer(sinks=[Gap(), CsvFile(tmp_path / "deep" / "run.csv"), Last()]))
    assert heard == [(name, epoch) for epoch in (0, 1) for name in ("first", "last", "gap")]
    with (tmp_path / "deep" / "run.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    for row, epoch in zip(rows, result.epochs, strict=True):
        assert epoch.eval_loss is not None
        assert float(row["gap"]) == epoch.eval_loss - epoch.train_loss
        assert float(row["eval_acc1"]) == epoch.eval_acc1
        assert {name: float(row[f"local_loss/{name}"]) for name, _ in epoch.local_losses} == dict(epoch.local_losses)


def test_early_stopping_counts_epochs_without_a_better_figure() -> None:
    def stops(sink: EarlyStopping, name: str, values: list[float]) -> int | None:
        host = FanOut([sink])
        host.on_start(INFO)
        for epoch, value in enumerate(values):
            host.on_epoch(replace(EPOCH, epoch=epoch, **{name: value}))
            if host.stop_reason:
                return epoch
        return None

    assert stops(EarlyStopping(2), "eval_loss", [3, 2, 2, 2, 1]) == 3
    assert stops(EarlyStopping(2), "eval_loss", [3, 2, 2, 1, 1]) is None
    assert stops(EarlyStopping(1, figure="eval_acc1"), "eval_acc1", [1, 2, 3, 3]) == 3
    assert stops(EarlyStopping(1, min_delta=0.5), "eval_loss", [3, 2.6, 2.1, 1.5]) == 1
    again = EarlyStopping(1)
    assert stops(again, "eval_loss", [1, 2]) == 1
    assert stops(again, "eval_loss", [5, 4]) is None  # of another run
    assert (again.best, again.best_epoch) == (4, 1)


def test_early_stopping_without_an_evaluation_says_what_it_misses() -> None:
    with pytest.raises(ValueError, match="an epoch has no eval_loss without an evaluation"):
        trainer(sinks=[EarlyStopping(1)]).fit(dataset(70), epochs=2, batch_size=16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"patience": 0}, "patience is 0"),
        ({"patience": 1.5}, "patience is 1.5"),
        ({"patience": 1, "figure": "loss"}, "figure 'loss' is not known; valid: eval_loss"),
        ({"patience": 1, "min_delta": float("nan")}, "min_delta is nan"),
        ({"patience": 1, "min_delta": -1}, "min_delta is -1"),
    ],
)
def test_other_arguments_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EarlyStopping(**given)


def test_a_sink_of_no_run_can_stop_none() -> None:
    with pytest.raises(RuntimeError, match=r"StopAfter belongs to no run; hand it to Trainer\(sinks=\[...\]\)"):
        StopAfter(0).on_epoch(EPOCH)


def test_the_first_reason_counts() -> None:
    sink = StopAfter(0)
    inner = FanOut([sink])
    outer = FanOut([inner])
    told: list[str] = []
    outer.on_stop = told.append
    assert outer.waits
    sink.stop("first")
    sink.stop("second")
    assert (outer.stop_reason, inner.stop_reason, told) == ("first", "", ["first"])
    assert not FanOut([FanOut([MetricsSink()])]).waits


def test_a_stop_needs_an_evaluation_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plain", "--early-stop", "2", "--no-eval"]) == 2
    assert "--early-stop needs the test loss" in capsys.readouterr().err


INFO = RunInfo(
    model="m",
    dataset="d",
    engine="e",
    rule="r",
    stages=(("conv1",),),
    total=9,
    epochs=3,
    steps_per_epoch=3,
    batch_size=2,  # type: ignore[arg-type]
)
