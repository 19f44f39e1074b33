"""The timeline in Chrome's format."""

import json
from pathlib import Path

import pytest

from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.workers.actions import Action, ActionKind
from unlocked.workers.stopwatch import Stopwatch


def test_a_trace_has_a_row_per_stage_and_an_event_per_action(tmp_path: Path) -> None:
    stopwatchs = [Stopwatch(keep=True), Stopwatch(keep=True)]
    for stopwatch in stopwatchs:
        stopwatch._offset = 1000.0  # seconds between the process's clock and the machine's
    stopwatchs[1].add(Action(1, ActionKind.RECV, 0), 2.0, 2.5)
    stopwatchs[0].add(Action(0, ActionKind.F, 12), 1.0, 1.25)
    path = tmp_path / "trace.json"
    spans = [span for stopwatch in reversed(stopwatchs) for span in stopwatch.timed]
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
