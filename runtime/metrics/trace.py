"""The file of a traced run: every action of every stage on one clock."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import write_json
from unlocked.workers.stopwatch import TimedAction

__all__ = ["write_chrome_trace"]

_LEGEND = {"F": "forward; inside a stage every layer but the last also updates here", "U": "the last layer's update"}


def write_chrome_trace(path: Path, timed: Iterable[TimedAction], rows: dict[int, str]) -> None:
    """Writes the timeline in Chrome's trace format (chrome://tracing, ui.perfetto.dev): one row per stage.

    Args:
        path: the file to write.
        timed: every stage's actions.
        rows: the name of each stage's row.
    """
    timed = sorted(timed, key=lambda one: one.start_us)
    begin = timed[0].start_us if timed else 0.0
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": stage, "args": {"name": name}}
        for stage, name in rows.items()
    ]
    events += [
        {
            "name": one.label,
            "cat": "".join(c for c in one.label.lstrip("0123456789") if c.isalpha()),
            "ph": "X",
            "pid": 0,
            "tid": one.stage,
            "ts": one.start_us - begin,
            "dur": one.end_us - one.start_us,
        }
        for one in timed
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"traceEvents": events, "displayTimeUnit": "ms", "otherData": _LEGEND}, indent=None)
