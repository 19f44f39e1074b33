"""The comparison as a whole, in real processes: figures that must agree, a contender that torch refuses, the files."""

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from unlocked.comparison.results import Contender, Report
from unlocked.launch.compare import main

pytestmark = pytest.mark.alone

QUICK = ["--num-epochs", "1", "--seeds", "1", "--repeats", "1", "--max-steps", "28"]


def _compare(folder: Path, *flags: str) -> dict[str, Contender]:
    assert main([*QUICK, "--output", str(folder), *flags]) == 0
    return {contender.name: contender for contender in Report.load(folder / "report.json").contenders}


def _last_epoch(contender: Contender) -> Any:
    return contender.accuracy_runs[0].epochs[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One comparison in which a schedule is told to take one chunk, which it refuses."""
    folder = tmp_path_factory.mktemp("whole")
    names = ["BP, 1 thread", "BP in a CUDA graph", "BP GPipe", "BP 1F1B", "LLS, 1 thread", "LLS, 2 processes"]
    _compare(folder, "--only", *names, "--chunks", "1", "--tensorboard", str(folder / "board"))
    return folder


def test_one_contender_fails_and_the_others_report(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report.load(whole / "report.json")
    found = {contender.name: contender for contender in report.contenders}
    refused = found.pop("BP 1F1B, 2 processes")
    assert refused.status == "failed"
    assert refused.reason is not None
    assert "Number of microbatches (1) must be greater than or equal to the number of stages (2)" in refused.reason
    absent = found.pop("BP in a CUDA graph")
    assert (absent.status, absent.reason, absent.runs) == ("not run", "no CUDA device", ())
    assert {contender.status for contender in found.values()} == {"measured"}
    for contender in found.values():
        (speed,), (accuracy,) = contender.speed_runs, contender.accuracy_runs
        assert (speed.steps, accuracy.steps) == (28, 23)
        assert len(speed.peak_memory_bytes) == len(speed.split) == contender.processes
        for part in speed.split:
            assert min(part.data, part.compute, part.wait, part.update) >= 0
            assert part.compute > 0
            assert 0 < part.total * speed.steps <= speed.train_seconds * 1.001


def test_an_uncut_pipeline_computes_what_the_plain_loop_does(whole: Path) -> None:
    found = {contender.name: contender for contender in Report.load(whole / "report.json").contenders}
    plain, piped = _last_epoch(found["BP, 1 thread"]), _last_epoch(found["BP GPipe, 2 processes"])
    # Another order of rounding, after 23 steps of Adam; a micro-batch cut in two is 4 % away.
    assert piped.train_loss == pytest.approx(plain.train_loss, rel=5e-3)
    assert piped.test_loss == pytest.approx(plain.test_loss, rel=5e-2)
    assert piped.test_acc1 == pytest.approx(plain.test_acc1, abs=1.2)


def test_both_engines_of_a_rule_end_in_the_same_weights(whole: Path) -> None:
    found = {contender.name: contender for contender in Report.load(whole / "report.json").contenders}
    one, two = found["LLS, 1 thread"], found["LLS, 2 processes"]
    assert [run.weights_sha256 for run in one.runs] == [run.weights_sha256 for run in two.runs]
    assert _last_epoch(one).test_acc1 == _last_epoch(two).test_acc1


def test_the_csv_files_hold_the_report(whole: Path) -> None:
    report = Report.load(whole / "report.json")
    with open(whole / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = [(c, run) for c in report.contenders for run in c.runs or (None,)]
    assert [(row["contender"], row["status"]) for row in rows] == [(c.name, c.status) for c, _ in runs]
    for row, (_, run) in zip(rows, runs, strict=True):
        assert row["images_per_second"] == ("" if run is None else repr(run.images_per_second))
    with open(whole / "epochs.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert {row["version/torch"] for row in epochs} == {report.environment.versions["torch"]}
    expected = [repr(run.test_acc1) for c in report.contenders for run in c.accuracy_runs]
    assert [row["test_acc1"] for row in epochs] == expected


def test_tensorboard_reads_the_epochs(whole: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = Report.load(whole / "report.json")
    events = accumulator.EventAccumulator(str(whole / "board" / "LLS_1_thread" / "seed-0"))
    events.Reload()
    contender = next(c for c in report.contenders if c.name == "LLS, 1 thread")
    read = [event.value for event in events.Scalars("accuracy/test")]
    assert read == pytest.approx([epoch.test_acc1 for epoch in contender.accuracy_runs[0].epochs], rel=1e-6)


def test_all_schedules_compute_the_same_and_two_have_timelines(tmp_path: Path) -> None:
    names = ["BP GPipe", "BP 1F1B", "BP zero-bubble", "BP ZBV", "LLS, 2 processes"]
    found = _compare(tmp_path, "--only", *names, "--chunks", "4")
    losses = [_last_epoch(c).train_loss for c in found.values() if c.family == "BP"]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)
    report = Report.load(tmp_path / "report.json")
    for contender in report.contenders:
        assert 0 < (contender.bubble_share.median if contender.bubble_share else 0) < 1, contender.name
    local, rival = sorted(report.timelines, key=lambda timeline: timeline.contender, reverse=True)
    assert (local.contender, rival.contender) == ("LLS, 2 processes", "BP 1F1B, 2 processes")
    assert local.seconds == rival.seconds
    for timeline in report.timelines:
        assert {span.row for span in timeline.spans} == {0, 1}
        for row in (0, 1):
            own = [span for span in timeline.spans if span.row == row]
            assert all(a.end <= b.start + 1e-6 for a, b in pairwise(own)), "a process does one thing"
    cut = {(s.kind, s.chunk) for s in rival.spans if s.chunk is not None}
    assert cut >= {(kind, chunk) for kind in ("forward", "backward") for chunk in range(4)}


def test_a_language_models_pipeline_computes_what_its_plain_loop_does(tmp_path: Path) -> None:
    text = ["--dataset", "stdlib", "--sequence-length", "16", "--num-train", "48", "--num-test", "12"]
    network = ["--model", "gpt-mini", "--model-width", "16", "--model-depth", "2"]
    sizes = ["--batch-size", "8", "--test-batch-size", "8", "--lr", "0.003", "--chunks", "4", "--repeats", "0"]
    found = _compare(tmp_path, *text, *network, *sizes, "--only", "BP, 1 thread", "BP 1F1B")
    plain, piped = _last_epoch(found["BP, 1 thread"]), _last_epoch(found["BP 1F1B, 2 processes"])
    assert piped.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert piped.test_loss == pytest.approx(plain.test_loss, rel=1e-5)
    assert piped.test_acc1 == pytest.approx(plain.test_acc1, abs=0.6), "of 192 tokens one"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--study", "nothing"], ["study 'nothing'", "memory, stages"]),
        (["--only", "nobody"], ["--only 'nobody'", "BP, 1 thread"]),
        (["--repeats", "-1"], ["repeats is -1", "at least 0"]),
        (["--repeats", "0", "--seeds", "0"], ["nothing to run"]),
        (["--lr", "0"], ["lr is 0.0", "must be positive"]),
        (["--model", "nothing"], ["nothing"]),
        (["--batch-size", "1437"], ["layer linear1", "1438 training rows", "--drop-last", "1436"]),
        (["--nonsense"], ["there is no flag --nonsense", "--help"]),
        (["--queue-depth", "0"], ["queue_depth is 0; it must be at least 1"]),
        (["--study", "memory", "--channels", "x"], ["--channels: invalid int value: 'x'"]),
        (["--study=stages", "--stages", "3"], ["there is no flag --stages; did you mean --max-stages?"]),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


def test_the_logged_run_is_part_of_the_report(whole: Path) -> None:
    content = json.loads((whole / "report.json").read_text())["logged"]
    assert content["trainings"]["BP"] == {
        "total_minutes": 9.0,
        "seconds_per_step": 0.0235,
        "data_seconds_per_step": 0.018,
        "test_acc1": 81.1,
        "test_acc5": 99.0,
    }
