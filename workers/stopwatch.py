"""Where a worker's time goes: busy and waiting seconds always, every action's times if a trace is asked for."""

import time
from dataclasses import dataclass, field

from unlocked.workers.actions import Action, ActionKind

__all__ = ["BUSY", "Stopwatch", "TimedAction"]

BUSY = frozenset({ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.SNAP})
"""The actions in which a stage works; in the others it waits, or hands over."""


@dataclass(frozen=True, slots=True)
class TimedAction:
    """One action: microseconds on the machine's wall clock, so that processes can be laid above each other."""

    stage: int
    label: str
    start_us: float
    end_us: float


@dataclass(slots=True)
class Stopwatch:
    """Adds up times of actions; `keep` also keeps every one of them."""

    keep: bool = False
    busy: float = 0.0
    waiting: float = 0.0
    training: float = 0.0
    """The busy seconds of training micro-batches alone: what a partition predicts."""
    train_steps: int = 0
    started: float = field(default_factory=time.perf_counter)
    timed: list[TimedAction] = field(default_factory=list)
    _offset: float = field(default_factory=lambda: time.time() - time.perf_counter())

    def restart(self) -> None:
        """Training begins now: whatever came before was set-up."""
        self.busy = self.waiting = self.training = 0.0
        self.train_steps = 0
        self.started = time.perf_counter()
        self.timed.clear()

    def add(self, action: Action, start: float, end: float, *, trains: bool = False) -> None:
        """An action that lasted from `start` to `end` seconds of time.perf_counter; `trains`: for a training item."""
        if action.kind in BUSY:
            self.busy += end - start
            if trains:
                self.training += end - start
                self.train_steps += action.kind is ActionKind.U
        else:
            self.waiting += end - start
        if self.keep:
            us = 1e6
            self.timed.append(
                TimedAction(action.stage, str(action), (start + self._offset) * us, (end + self._offset) * us)
            )

    def sums(self) -> tuple[float, float, float, int]:
        """All that it has added up."""
        return self.busy, self.waiting, self.training, self.train_steps

    def take_over(self, sums: tuple[float, float, float, int]) -> None:
        """Goes on from what another worker's has added up."""
        self.busy, self.waiting, self.training, self.train_steps = sums

    def seconds_per_step(self) -> float:
        """Busy seconds of a training micro-batch, on average; 0 where none was timed."""
        return self.training / self.train_steps if self.train_steps else 0.0

    def add_timed(self, action: Action, start_us: float, end_us: float) -> None:
        """An action by the machine's clock, for the trace alone."""
        if self.keep:
            self.timed.append(TimedAction(action.stage, str(action), start_us, end_us))

    def estimate_busy(self, fraction: float) -> None:
        """The busy time that this share of the time so far makes: where actions are timed in samples."""
        self.busy = fraction * (time.perf_counter() - self.started)
