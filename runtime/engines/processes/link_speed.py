"""How quick the links between neighbouring ranks are, measured over what their edges are going to be.

All pairs (0, 1), (2, 3), ... measure together, then all pairs (1, 2), (3, 4), ...: no rank is in two pairs at once.
"""

import json
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import await_keys
from unlocked.runtime.schedules.placement import Link

__all__ = ["links_of", "measure_links"]

_SENDER, _RECEIVER = 0, 1
_PATIENCE = timedelta(seconds=10)  # for one message: a link that is slower is not measured
_TRIPS_SECONDS, _LEAST_TRIPS, _MOST_TRIPS = 0.1, 3, 50
_BURST = 8  # messages that follow each other, as micro-batches do
_FIRST_BYTES, _MOST_BYTES = 2 << 10, 4 << 20  # of a message
_BURST_SECONDS = 0.06  # that a burst must last, or else the next one has twice its bytes: a link begins slowly


def measure_links(store: dist.Store, world: World, timeout: float) -> None:
    """This rank's part; about 0.4 s with each neighbour. What fails is told and ends nothing: the edges, which are made
    later, have their own errors.

    Args:
        timeout: seconds that a neighbour may take to come.
    """
    first = world.rank - 1 if world.rank % 2 else world.rank
    for left in (first, 2 * world.rank - 1 - first):  # the even pair, then the odd one
        if 0 <= left < world.size - 1:
            said: dict[str, Any]
            try:
                link = _measure(dist.PrefixStore(f"link-{left}", store), world.rank - left, timeout)
                said = {"latency": link.latency, "bandwidth": link.bandwidth}
            except (RuntimeError, TimeoutError) as error:
                said = {"problem": first_line(error)}
            if world.rank == left:
                store.set(f"link-speed-{left}", json.dumps(said, allow_nan=False))


def links_of(store: dist.Store, world: World, timeout: float) -> tuple[list[Link | None], str]:
    """What all pairs have found, by the rank of their left one, and why one was not measured (else nothing).

    Raises:
        TimeoutError: a rank has not said it within `timeout` seconds.
    """
    keys = [f"link-speed-{left}" for left in range(world.size - 1)]
    await_keys(store, keys, timeout)
    told = [json.loads(store.get(key)) for key in keys]
    problem = next((f"{left}-{left + 1}: {one['problem']}" for left, one in enumerate(told) if "problem" in one), "")
    return [None if "problem" in one else Link(one["latency"], one["bandwidth"]) for one in told], problem


def _measure(store: dist.Store, side: int, timeout: float) -> Link:
    store.set(f"here-{side}", "")
    await_keys(store, [f"here-{1 - side}"], timeout)  # Gloo waits for all its attempts, without a look at signals
    group = dist.ProcessGroupGloo(store, side, 2, timeout=_PATIENCE)
    ends = _Ends(group, 1 - side)
    if side == _RECEIVER:
        ends.answer_trips()
        ends.take_bursts()
        return Link(0.0, 1.0)  # the sender knows
    latency = ends.trips()
    return Link(latency, max(ends.bursts(), 1.0))


class _Ends:
    """One end of a pair. A word is a number in a small message; the sender's 0 ends what goes on."""

    def __init__(self, group: Any, other: int) -> None:
        self._group, self._other = group, other

    def trips(self) -> float:
        """Seconds of a small message, one way: half the quickest round trip, the others have waited for a core too."""
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < _LEAST_TRIPS or (len(times) < _MOST_TRIPS and time.perf_counter() - began < _TRIPS_SECONDS):
            start = time.perf_counter()
            self._say(1)
            self._hear()
            times.append(time.perf_counter() - start)
        self._say(0)
        return min(times) / 2

    def answer_trips(self) -> None:
        while self._hear():
            self._say(1)

    def bursts(self) -> float:
        """Bytes per second between the first and the last message of the longest burst, by the receiver's clock. The
        quicker of two: one that was long because a process had to wait for a core is no measure of the link."""
        size = _FIRST_BYTES
        while True:
            seconds = self._burst(size)
            if seconds > _BURST_SECONDS or size == _MOST_BYTES:
                seconds = min(seconds, self._burst(size))
            if seconds > _BURST_SECONDS or size == _MOST_BYTES:
                self._say(0)
                return (_BURST - 1) * size / seconds
            size *= 2

    def _burst(self, size: int) -> float:
        self._say(size)
        self._hear()  # it has posted its receives
        message = torch.zeros(size, dtype=torch.uint8)
        for work in [self._group.send([message], self._other, 1) for _ in range(_BURST)]:
            work.wait(_PATIENCE)
        return 1e-9 * max(self._hear(), 1)

    def take_bursts(self) -> None:
        while size := self._hear():
            slots = [torch.empty(size, dtype=torch.uint8) for _ in range(_BURST)]
            works = [self._group.recv([slot], self._other, 1) for slot in slots]
            self._say(1)
            works[0].wait(_PATIENCE)
            first = time.perf_counter_ns()
            for work in works[1:]:
                work.wait(_PATIENCE)
            self._say(time.perf_counter_ns() - first)

    def _say(self, word: int) -> None:
        self._group.send([torch.tensor([word])], self._other, 0).wait(_PATIENCE)

    def _hear(self) -> int:
        word: Tensor = torch.zeros(1, dtype=torch.int64)
        self._group.recv([word], self._other, 0).wait(_PATIENCE)
        return int(word)
