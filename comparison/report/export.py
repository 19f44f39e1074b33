"""The report's figures as CSV, for spreadsheets."""

import csv
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path

from unlocked.comparison.results import Contender, Report, Run
from unlocked.runtime.saving.whole_file import write_whole

__all__ = ["write_epochs_csv", "write_rows", "write_runs_csv"]


def write_runs_csv(report: Report, path: Path) -> None:
    """One row per run; one per contender without runs, with its reason. Lists of processes are joined by spaces."""
    rows = [_run_row(c, run) for c in report.contenders for run in (c.runs or (None,))]
    write_rows(path, rows)


def write_epochs_csv(report: Report, path: Path) -> None:
    """One row per epoch of every accuracy run, with the seed and the versions."""
    versions = {f"version/{name}": version for name, version in report.environment.versions.items()}
    rows = [
        {
            "contender": contender.name,
            "family": contender.family,
            "seed": run.seed,
            "epoch": epoch.epoch,
            "seconds": epoch.seconds,
            "train_loss": epoch.train_loss,
            "test_loss": epoch.test_loss,
            "test_acc1": epoch.test_acc1,
            **versions,
        }
        for contender in report.contenders
        for run in contender.accuracy_runs
        for epoch in run.epochs
    ]
    write_rows(path, rows)


def _run_row(contender: Contender, run: Run | None) -> dict[str, object]:
    row: dict[str, object] = {
        "contender": contender.name,
        "family": contender.family,
        "engine": contender.engine,
        "processes": contender.processes,
        "threads": contender.threads,
        "chunks": contender.chunks,
        "stages": " | ".join(" ".join(stage) for stage in contender.stages),
        "status": contender.status,
        "reason": contender.reason,
    }
    if run is None:
        return row
    row |= {
        "kind": run.kind,
        "seed": run.seed,
        "steps": run.steps,
        "train_seconds": run.train_seconds,
        "setup_seconds": run.setup_seconds,
        "images_per_second": run.images_per_second,
    }
    for part in ("data", "compute", "wait", "update"):
        row[f"{part}_seconds_per_step"] = " ".join(repr(getattr(split, part)) for split in run.split)
    return row | {
        "peak_memory_bytes": " ".join(map(str, run.peak_memory_bytes)),
        "base_memory_bytes": " ".join(map(str, run.base_memory_bytes)),
        "bubble_share": run.bubble_share,
        "energy_joules": run.energy_joules,
        "test_acc1": run.test_acc1,
    }


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """A table with a column for every key of the rows, in their order; None is empty."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())
