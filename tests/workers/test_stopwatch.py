"""Busy and waiting time, and the timeline in Chrome's format."""

import json
from pathlib import Path

import pytest

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Recorder, write_chrome_trace

BUSY = {ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP}


def test_every_kind_counts_as_busy_or_as_waiting() -> None:
    recorder = Recorder()
    for i, kind in enumerate(ActionKind):
        recorder.add(Action(0, kind, 0), 10.0, 10.0 + 2**i)
    expected = sum(2**i for i, kind in enumerate(ActionKind) if kind in BUSY)
    assert recorder.busy == expected
    assert recorder.waiting == 2 ** len(ActionKind) - 1 - expected
    assert recorder.spans == []  # only kept if asked for


def test_a_step_is_forward_and_update_of_training_micro_batches() -> None:
    """What a partition predicts: neither waiting, nor evaluation, nor the forward passes of statistics."""
    recorder = Recorder()
    assert recorder.seconds_per_step() == 0.0
    for kind, seconds, trains in [
        (ActionKind.RECV, 50.0, True),
        (ActionKind.F, 1.0, True),
        (ActionKind.U, 2.0, True),
        (ActionKind.SEND, 50.0, True),
        (ActionKind.F, 1.5, True),
        (ActionKind.U, 3.5, True),
        (ActionKind.F, 9.0, False),
        (ActionKind.E, 9.0, False),
    ]:
        recorder.add(Action(0, kind, 0), 0.0, seconds, trains=trains)
    assert recorder.seconds_per_step() == 4.0
    recorder.restart()
    assert recorder.seconds_per_step() == 0.0


def test_a_restart_forgets_what_was_before() -> None:
    recorder = Recorder(keep=True)
    recorder.add(Action(0, ActionKind.F, 0), 0.0, 5.0)
    before = recorder.started
    recorder.restart()
    assert (recorder.busy, recorder.waiting, recorder.spans) == (0.0, 0.0, [])
    assert recorder.started >= before
    assert recorder.busy_fraction() == 0.0


def test_a_trace_has_a_row_per_stage_and_an_event_per_action(tmp_path: Path) -> None:
    recorders = [Recorder(keep=True), Recorder(keep=True)]
    for recorder in recorders:
        recorder._offset = 1000.0  # seconds between the process's clock and the machine's
    recorders[1].add(Action(1, ActionKind.RECV, 0), 2.0, 2.5)
    recorders[0].add(Action(0, ActionKind.F, 12), 1.0, 1.25)
    path = tmp_path / "trace.json"
    spans = [span for recorder in reversed(recorders) for span in recorder.spans]
    write_chrome_trace(path, spans, {0: "stage 0: conv1", 1: "stage 1: output"})
    events = json.loads(path.read_text())["traceEvents"]
    names = [event for event in events if event["ph"] == "M"]
    assert [(event["tid"], event["args"]["name"]) for event in names] == [(0, "stage 0: conv1"), (1, "stage 1: output")]
    actions = [event for event in events if event["ph"] == "X"]
    assert [(event["name"], event["cat"], event["tid"]) for event in actions] == [
        ("0F12", "F", 0),
        ("1RECV0", "RECV", 1),
    ]
    assert [event["ts"] for event in actions] == pytest.approx([0.0, 1e6])  # microseconds after the first
    assert [event["dur"] for event in actions] == pytest.approx([0.25e6, 0.5e6])


def test_an_empty_trace_is_valid(tmp_path: Path) -> None:
    write_chrome_trace(tmp_path / "trace.json", [], {})
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []
