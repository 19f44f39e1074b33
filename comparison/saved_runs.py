"""Runs that were saved, read from their folders: settings, epochs and last figures, and what tells them apart."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlocked.runtime.saving.whole_file import json_text

__all__ = ["SavedRun", "SavedTable", "differences", "find_saved_runs", "table_of"]

_ITS_OWN = frozenset(
    (
        *("save_path", "experiment_name", "run_number", "summary", "trace", "resume", "snapshot_dir", "best_dir"),
        *("tensorboard", "mlflow", "wandb", "trackio", "plain", "dataset_dir", "coordinator_port"),
    )
)
"""Settings that every run has of its own, or that say where something lies: they tell no runs apart."""
_NONE = "-"


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """One run.

    Attributes:
        name: its folder, from where all of them lie.
        settings: JSON values by name.
        epochs: a row per epoch: numbers by the columns of `metrics.csv`, None where there is none.
        figures: what its log says at the end (`RunResult.figures`); empty where it has not ended.
    """

    folder: Path
    name: str
    settings: Mapping[str, Any]
    epochs: Sequence[Mapping[str, float | None]]
    figures: Mapping[str, Any]

    def curve(self, column: str) -> list[tuple[int, float]]:
        """(epoch from 1, value) of every epoch that has one."""
        found = [(int(row["epoch"] or 0) + 1, row.get(column)) for row in self.epochs]
        return [(epoch, value) for epoch, value in found if value is not None]

    def layer_accuracies(self) -> list[dict[str, float]]:
        """Of every epoch that tells them: the layers' own test accuracies in percent, in network order."""
        prefix = "eval_acc1/"
        found = [
            {
                name.removeprefix(prefix): value
                for name, value in row.items()
                if name.startswith(prefix) and value is not None
            }
            for row in self.epochs
        ]
        return [layers for layers in found if len(layers) > 1]

    @property
    def best(self) -> tuple[int, float] | None:
        """Epoch, from 1, and percent of the best test accuracy; of equals the first."""
        return max(self.curve("eval_acc1"), key=lambda point: point[1], default=None)


@dataclass(frozen=True, kw_only=True)
class SavedTable:
    """The runs' table as text, a row each."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def find_saved_runs(paths: Sequence[Path]) -> tuple[list[SavedRun], list[str]]:
    """The runs in these folders and below them, in the order of their names, and a line for each that can't be read.

    Raises:
        ValueError: a path is no folder, or there is no run that can be read.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; give folders of runs, or folders that hold such")
        found = [file.parent for file in path.rglob("config.json")]
        if not found:
            raise ValueError(f"{path} holds no runs: there is no config.json in it or below; train with --save-path")
        folders.update(dict.fromkeys(sorted((folder.resolve() for folder in found), key=_natural)))
    base = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(_read(folder, str(folder.relative_to(base))))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            problems.append(f"{folder} is no run, or is damaged: {type(error).__name__}: {error}")
    if not runs:
        raise ValueError(problems[0])
    return runs, problems


def differences(runs: Sequence[SavedRun]) -> list[str]:
    """The settings that tell the runs apart, in the order of the first run's config."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _ITS_OWN)
    return [name for name in names if len({json_text(run.settings.get(name), default=str) for run in runs}) > 1]


def table_of(runs: Sequence[SavedRun]) -> SavedTable:
    """A row per run: what tells it apart, and how it ended."""
    told = differences(runs)
    head = [
        "run",
        *(name.replace("_", " ") for name in told),
        "epochs",
        "best, %",
        "in epoch",
        "last, %",
        "test loss",
        "images/s",
    ]
    rows = []
    for run in runs:
        best, last, loss = run.best, run.curve("eval_acc1")[-1:], run.curve("eval_loss")[-1:]
        rate = run.figures.get("images_per_second")
        rows.append(
            [
                run.name,
                *(_text(run.settings.get(name)) for name in told),
                f"{len(run.epochs)}" if run.figures else f"{len(run.epochs)}, not ended",
                f"{best[1]:.2f}" if best else _NONE,
                f"{best[0]}" if best else _NONE,
                f"{last[0][1]:.2f}" if last else _NONE,
                f"{loss[0][1]:.4f}" if loss else _NONE,
                f"{rate:,.0f}" if isinstance(rate, int | float) else _NONE,
            ]
        )
    return SavedTable(head=head, rows=rows)


def _read(folder: Path, name: str) -> SavedRun:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    if not isinstance(settings, dict):
        raise TypeError("its settings are no table")
    return SavedRun(folder=folder, name=name, settings=settings, epochs=_epochs(folder), figures=_figures(folder))


def _epochs(folder: Path) -> list[dict[str, float | None]]:
    try:
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []  # it ended before its first epoch did
    return [{key: float(value) if value else None for key, value in row.items()} for row in rows]


def _figures(folder: Path) -> dict[str, Any]:
    """Of the last line that says so: a resumed run has several."""
    try:
        lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    last = next((line for line in reversed(lines) if line.startswith("Finished: ")), "Finished: {}")
    figures = json.loads(last.removeprefix("Finished: "))
    return figures if isinstance(figures, dict) else {}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Table-2 before Table-10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _text(value: object) -> str:
    if value is None:
        return _NONE
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
