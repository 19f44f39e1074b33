"""When a stage saves itself in memory, and how a later worker goes on from there.

As often as costs at most a hundredth of its time, before the log of its incoming edge is full, and before doing again
what lies behind it would take longer than the neighbours wait.
"""

import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from unlocked.data import LoaderDataset
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.job import Job
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.workers.actions import Item
from unlocked.workers.edges import InEdge, OutEdge
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["FULL_LOG", "LoggedInEdge", "LoggedOutEdge", "MemorySaver", "save_interval"]

_SHARE = 0.01  # of a stage's time that its own snapshots may take
_SHORTEST, _LONGEST = 0.2, 30.0  # seconds between two of them, while the log has room
_PATIENCE = 0.25  # share of the neighbours' time limit that lies between two; half of it goes to miss a silent worker
FULL_LOG = 0.5
"""How full the log of the incoming edge may be before its stage saves itself."""


def save_interval(used: float, timeout: float) -> float:
    """Seconds from one snapshot of a stage in memory to the next one, where the log has room for as long.

    Args:
        used: seconds that the last one took.
        timeout: seconds that the neighbours wait for a micro-batch.
    """
    return min(max(used / _SHARE, _SHORTEST), _LONGEST, _PATIENCE * timeout)


class LoggedInEdge(InEdge, Protocol):
    """An incoming edge whose sender keeps what has been sent."""

    keeps_log: bool
    """False: what is released may go."""
    count: int
    """Micro-batches that were released."""

    @property
    def unkept(self) -> float:
        """How full the log is, 0 to 1, of micro-batches that wait for `keep`."""
        ...

    def keep(self) -> None:
        """What was released until now will never be asked for again."""
        ...

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`."""
        ...


class LoggedOutEdge(OutEdge, Protocol):
    """An outgoing edge that keeps what was sent."""

    count: int
    """Micro-batches that were let go."""

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`: what was sent before is not sent again."""
        ...


class MemorySaver:
    """Use: construct, `connect`, `take_over` in a later worker, `after` every item.

    Args:
        settle: whether the run's own snapshots have all that this stage owes them, and waits for that if told to: a
            later worker begins behind their marks.
    """

    def __init__(self, memory: MemorySnapshot, job: Job, stage: Stage, settle: Callable[[bool], bool]) -> None:
        self._memory, self._job, self._stage, self._settle = memory, job, stage, settle
        self._began = self._saved_at = time.perf_counter()
        self._interval = _SHORTEST
        # What was read again has put the generators where the stream has them. The dead worker's, when it saved itself,
        # stood where its read-ahead had come to.
        self._reads_loaders = stage.index == 0 and any(isinstance(d, LoaderDataset) for d in (job.train, job.test))

    def connect(
        self, reporter: StageReporter, stopwatch: Stopwatch, inbox: LoggedInEdge | None, outbox: LoggedOutEdge | None
    ) -> None:
        self._reporter, self._stopwatch, self._inbox, self._outbox = reporter, stopwatch, inbox, outbox
        if inbox is not None:
            inbox.keeps_log = True

    @property
    def reached(self) -> int:
        """The position to which a worker of this stage has come."""
        return self._memory.reached

    def take_over(self, state: dict[str, Any] | None) -> float:
        """Puts the stage, its edges and its figures where a dead worker's last snapshot has them; None: it had none.

        Returns:
            Seconds that the workers before have run until then.
        """
        self._began = time.perf_counter()
        if state is None:
            return 0.0
        for layer, its in zip(self._stage.layers, state["layers"], strict=True):
            layer.load_exact_state(its)
        self._reporter.take_over(state["reporter"])
        self._stopwatch.take_over(state["stopwatch"])
        if self._inbox is not None:
            self._inbox.go_back(state["received"])
        if self._outbox is not None:
            self._outbox.go_back(state["sent"])
        if not self._reads_loaders:
            torch.set_rng_state(state["torch"])
            random.setstate(state["random"])
        seconds = float(state["seconds"])
        self._began -= seconds
        return seconds

    def after(self, item: Item) -> None:
        """The stage has done everything for `item`."""
        self._memory.reached = max(self._memory.reached, item.position + 1)
        # A learning rate that the coordinator sets is known for the epoch at hand alone.
        begins = self._job.lr_factor.needs_losses and item.kind == "train" and item.index == 0
        is_full = self._inbox is not None and self._inbox.unkept >= FULL_LOG
        is_due = begins or is_full or time.perf_counter() - self._saved_at >= self._interval
        if is_due and self._settle(begins or is_full):
            self.save(item.position + 1)

    def save(self, position: int) -> None:
        """The stage as it is before `position`."""
        began, used = time.perf_counter(), time.thread_time()
        self._memory.write(
            {
                "position": position,
                "layers": [layer.exact_state() for layer in self._stage.layers],
                "reporter": self._reporter.state(),
                "stopwatch": self._stopwatch.sums(),
                "received": 0 if self._inbox is None else self._inbox.count,
                "sent": 0 if self._outbox is None else self._outbox.count,
                "torch": torch.get_rng_state(),
                "random": random.getstate(),
                "seconds": began - self._began,
            }
        )
        if self._inbox is not None:
            self._inbox.keep()
        self._saved_at = time.perf_counter()
        # By the processor's time: on a busy machine the clock's would have a stage save itself ever more rarely.
        self._interval = save_interval(time.thread_time() - used, self._job.settings.timeout)
