"""Busy and waiting time, and the timeline in Chrome's format."""

import json
from pathlib import Path

import pytest

from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Stopwatch, write_chrome_trace

BUSY = {ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP}


def test_every_kind_counts_as_busy_or_as_waiting() -> None:
    stopwatch = Stopwatch()
    for i, kind in enumerate(ActionKind):
        stopwatch.add(Action(0, kind, 0), 10.0, 10.0 + 2**i)
    expected = sum(2**i for i, kind in enumerate(ActionKind) if kind in BUSY)
    assert stopwatch.busy == expected
    assert stopwatch.waiting == 2 ** len(ActionKind) - 1 - expected
    assert stopwatch.timed == []  # only kept if asked for


def test_a_step_is_forward_and_update_of_training_micro_batches() -> None:
    """What a partition predicts: neither waiting, nor evaluation, nor the forward passes of statistics."""
    stopwatch = Stopwatch()
    assert stopwatch.seconds_per_step() == 0.0
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
        stopwatch.add(Action(0, kind, 0), 0.0, seconds, trains=trains)
    assert stopwatch.seconds_per_step() == 4.0
    stopwatch.restart()
    assert stopwatch.seconds_per_step() == 0.0


def test_a_restart_forgets_what_was_before() -> None:
    stopwatch = Stopwatch(keep=True)
    stopwatch.add(Action(0, ActionKind.F, 0), 0.0, 5.0)
    before = stopwatch.started
    stopwatch.restart()
    assert (stopwatch.busy, stopwatch.waiting, stopwatch.timed) == (0.0, 0.0, [])
    assert stopwatch.started >= before


def test_a_trace_has_a_row_per_stage_and_an_event_per_action(tmp_path: Path) -> None:
    stopwatchs = [Stopwatch(keep=True), Stopwatch(keep=True)]
    for stopwatch in stopwatchs:
        stopwatch._offset = 1000.0  # seconds between the process's clock and the machine's
    stopwatchs[1].add(Action(1, ActionKind.RECV, 0), 2.0, 2.5)
    stopwatchs[0].add(Action(0, ActionKind.F, 12), 1.0, 1.25)
    path = tmp_path / "trace.json"
    timed = [one for stopwatch in reversed(stopwatchs) for one in stopwatch.timed]
    write_chrome_trace(path, timed, {0: "stage 0: conv1", 1: "stage 1: output"})
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
