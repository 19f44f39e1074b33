"""The file of a traced run: every action of every stage on one clock."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import write_whole
from unlocked.workers.stopwatch import Span

__all__ = ["write_chrome_trace"]


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
    write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
