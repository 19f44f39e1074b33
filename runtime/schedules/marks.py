"""Where a run saves itself: after every so many training micro-batches, which every stage can count, or by the clock.

A mark of the clock is decided once, by whoever hands out the stream, at a place that no stage has come to; it travels
with the stream, so that all stages save the same moment. What a run computes does not depend on where marks stand.
"""

import re
from collections.abc import Set
from dataclasses import dataclass

from unlocked.runtime.fields import LARGEST, LONGEST_WAIT
from unlocked.runtime.schedules.stream import StreamPlan

__all__ = ["Period", "TimedMarks"]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_SHORTEST = 0.1  # seconds
_TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)")


@dataclass(frozen=True, slots=True)
class Period:
    """How often: after so many training micro-batches, or seconds; both 0: never."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, value: int | str) -> "Period":
        """What `snapshot_every` says: 200 (micro-batches), "60s", "10m" or "2h".

        Raises:
            ValueError: it says neither.
        """
        if isinstance(value, int):
            return cls(steps=value)
        match = _TEXT.fullmatch(value.strip())
        if match is not None and not match[2] and match[1].isdecimal() and int(match[1]) <= LARGEST:
            return cls(steps=int(match[1]))
        seconds = float(match[1]) * _UNITS[match[2]] if match is not None and match[2] else 0.0
        if not _SHORTEST <= seconds <= LONGEST_WAIT:
            raise ValueError(
                f"snapshot_every is {value[:80]!r}; it must be a number of training micro-batches, or a time from "
                f"{_SHORTEST:g}s to {LONGEST_WAIT:g}s such as 60s, 10m or 2h"
            )
        return cls(seconds=seconds)

    def __str__(self) -> str:
        return f"{self.seconds:g} s" if self.seconds else f"{self.steps} micro-batches"


class TimedMarks:
    """Decides where the marks of one run stand that come by the clock. They are at least `seconds` apart, and none is
    set before the snapshot of the one before is complete.

    Args:
        plan: of the run.
        seconds: between two marks; 0: there are none.
    """

    def __init__(self, plan: StreamPlan, seconds: float, now: float) -> None:
        self._plan, self._seconds, self._due = plan, seconds, now + seconds
        self._open: int | None = None  # the mark whose snapshot is not complete
        self._set: frozenset[int] = frozenset()

    @property
    def positions(self) -> Set[int]:
        """Of the training micro-batches that the newest mark follows: it, or nothing. Whoever is to come to it knows it
        before, and no other is set until all have."""
        return self._set

    def look(self, position: int, now: float) -> Set[int]:
        """Sets a mark if one is due; `positions`.

        Args:
            position: the first one of the stream that no stage has been told to do.
            now: seconds, of the clock that the first look was by.
        """
        if self._seconds and self._open is None and now >= self._due:
            at = self._plan.next_training(position)
            if at is not None:
                self._open, self._set, self._due = at, frozenset((at,)), now + self._seconds
        return self._set

    def complete(self, position: int) -> None:
        """The snapshot from which a run goes on at `position` is on the disk."""
        if self._open is not None and position == self._open + 1:
            self._open = None
