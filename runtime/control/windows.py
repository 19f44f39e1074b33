"""How far ahead the stages may run: enough that none starves, little enough that an orderly stop is quick."""

import math
from collections.abc import Callable

from unlocked.runtime.learning_rate import LearningRate
from unlocked.runtime.schedules.marks import TimedMarks

__all__ = ["EpochGate", "WindowPolicy"]


class WindowPolicy:
    """Decides how far the stages may run: `granted` grows so that 0.5 to 1 s of the stream lies ahead.

    Little enough that an orderly stop takes effect quickly, enough that no stage starves.

    Args:
        first, total: the run covers stream positions first to total - 1.
        minimum: positions to grant ahead whatever the speed.
        seconds: the lookahead aimed at; between one and two of these lie ahead.
        marks: where the run saves itself by the clock; they are set in what is granted anew.
    """

    def __init__(
        self, first: int, total: int, minimum: int, seconds: float = 0.5, marks: TimedMarks | None = None
    ) -> None:
        self.marks = marks
        self.granted = first
        self.limit = total
        """Nothing beyond is granted; may grow."""
        self._minimum = minimum
        self._seconds = seconds
        self._leader = first
        self._rate = 0.0  # positions per second
        self._anchor: tuple[float, int] | None = None
        self._now = 0.0  # when a stage was heard of last

    @property
    def mark(self) -> int | None:
        """Behind which training micro-batch the newest mark stands."""
        return next(iter(self.marks.positions), None) if self.marks is not None else None

    @property
    def lookahead(self) -> int:
        """Positions that must at least lie ahead of the first stage."""
        return max(self._minimum, math.ceil(self._rate * self._seconds))

    def observe(self, position: int, now: float) -> None:
        """A stage has completed the positions < `position` at time `now` (seconds)."""
        self._now = now
        self._leader = max(self._leader, min(position, self.granted))
        if self._anchor is None:
            self._anchor = (now, self._leader)
        elapsed = now - self._anchor[0]
        if elapsed >= 0.1:  # shorter spans measure the messages' jitter, not the stages
            rate = (self._leader - self._anchor[1]) / elapsed
            self._rate = rate if self._rate == 0.0 else (self._rate + rate) / 2
            self._anchor = (now, self._leader)

    def extend(self) -> bool:
        """Grants more where needed; True if `granted` grew."""
        if self._leader + self.lookahead < self.granted:
            return False
        # Until the speed is known, the smallest window; then twice the lookahead, so that grants are rare.
        ahead = 2 * self.lookahead if self._rate > 0.0 else self._minimum
        before, self.granted = self.granted, max(self.granted, min(self.limit, self._leader + ahead))
        if self.marks is not None and self.granted > before:
            self.marks.look(before, self._now)
        return self.granted > before


class EpochGate:
    """Holds the stream back at the end of every epoch until its test loss has set the next epoch's learning rate, or
    until a metrics sink has heard of it.

    By then every stage has completed the epoch, so one factor is right for all of them at any time.

    Args:
        end_of: an epoch of the run -> the position after its last item.
        epochs: of the run.
        epoch: the first one to run.
        for_sinks: it opens after the sinks have heard of the epoch, and not before.
    """

    def __init__(
        self, rate: LearningRate, end_of: Callable[[int], int], epochs: int, epoch: int, *, for_sinks: bool = False
    ) -> None:
        self._rate, self._end_of, self._epochs = rate, end_of, epochs
        self.for_sinks = for_sinks
        self._open(epoch)

    def observe(self, epoch: int, loss: float | None) -> str | None:
        """Takes the test loss of `epoch`, if it has one, as soon as it is known: a snapshot behind that epoch tells it.
        A line for the user if the rate changes."""
        return None if loss is None else self._rate.observe(epoch, loss)

    def let_pass(self, epoch: int) -> None:
        """Whoever was to hear of `epoch` has: opens the next one."""
        if epoch + 1 < self._epochs:
            self._open(epoch + 1)

    def _open(self, epoch: int) -> None:
        self.limit = self._end_of(epoch)
        """Where the stream is held back now."""
        self.factor = self._rate(epoch)
        """Of the learning rate, in the epoch that ends there."""
