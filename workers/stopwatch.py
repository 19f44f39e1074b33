"""Where a worker's time goes: busy and waiting seconds always, every action's times if a trace is asked for."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unlocked.workers.actions import Action, ActionKind

__all__ = ["Recorder", "Span", "write_chrome_trace"]

_BUSY = (ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP)


@dataclass(frozen=True, slots=True)
class Span:
    """One action: microseconds on the machine's wall clock, so that processes can be laid above each other."""

    stage: int
    label: str
    start_us: float
    end_us: float


@dataclass(slots=True)
class Recorder:
    """Adds up times of actions; `keep` also keeps every one of them."""

    keep: bool = False
    busy: float = 0.0
    waiting: float = 0.0
    training: float = 0.0
    """The busy seconds of training micro-batches alone: what a partition predicts."""
    train_steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    _offset: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def restart(self) -> None:
        """Training begins now: whatever came before was set-up."""
        self.busy = self.waiting = self.training = 0.0
        self.train_steps = 0
        self.started = time.perf_counter()
        self.spans.clear()

    def add(self, action: Action, start: float, end: float, *, trains: bool = False) -> None:
        """An action that lasted from `start` to `end` seconds of time.perf_counter; `trains`: for a training item."""
        if action.kind in _BUSY:
            self.busy += end - start
            if trains:
                self.training += end - start
                self.train_steps += action.kind is ActionKind.U
        else:
            self.waiting += end - start
        if self.keep:
            us = 1e6
            self.spans.append(Span(action.stage, str(action), (start + self._offset) * us, (end + self._offset) * us))

    def seconds_per_step(self) -> float:
        """Busy seconds of a training micro-batch, on average; 0 where none was timed."""
        return self.training / self.train_steps if self.train_steps else 0.0

    def add_span(self, action: Action, start_us: float, end_us: float) -> None:
        """An action by the machine's clock, for the trace alone."""
        if self.keep:
            self.spans.append(Span(action.stage, str(action), start_us, end_us))

    def estimate_busy(self, fraction: float) -> None:
        """The busy time that this share of the time so far makes: where actions are timed in samples."""
        self.busy = fraction * (time.perf_counter() - self.started)

    def busy_fraction(self) -> float:
        return self.busy / max(time.perf_counter() - self.started, 1e-9)


def write_chrome_trace(path: Path, spans: Iterable[Span], rows: dict[int, str]) -> None:
    """Writes the timeline in Chrome's trace format (chrome://tracing, ui.perfetto.dev): one row per stage.

    Args:
        path: the file to write.
        spans: every stage's actions.
        rows: the name of each stage's row.
    """
    spans = sorted(spans, key=lambda span: span.start_us)
    begin = spans[0].start_us if spans else 0.0
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": stage, "args": {"name": name}}
        for stage, name in rows.items()
    ]
    events += [
        {
            "name": span.label,
            "cat": "".join(c for c in span.label.lstrip("0123456789") if c.isalpha()),
            "ph": "X",
            "pid": 0,
            "tid": span.stage,
            "ts": span.start_us - begin,
            "dur": span.end_us - span.start_us,
        }
        for span in spans
    ]
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
