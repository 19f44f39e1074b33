"""The training log that the project is measured against, as plain data."""

import json
from dataclasses import dataclass
from pathlib import Path

from unlocked.runtime.typed import from_plain

__all__ = ["LoggedRun", "LoggedTraining"]


@dataclass(frozen=True, kw_only=True)
class LoggedTraining:
    """One rule's part of the logged run."""

    total_minutes: float
    seconds_per_step: float
    data_seconds_per_step: float
    """Of which waiting for data."""
    test_acc1: float
    test_acc5: float
    """Percent."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The training log that the project is measured against."""

    note: str
    command: str
    model: str
    dataset: str
    epochs: int
    batch_size: int
    steps_per_epoch: int
    trainings: dict[str, LoggedTraining]
    """By family: BP and LLS."""

    @staticmethod
    def load() -> "LoggedRun":
        """The one that lies beside this file."""
        text = Path(__file__).with_name("logged_run.json").read_text(encoding="utf-8")
        return from_plain(LoggedRun, json.loads(text), "the logged run")
