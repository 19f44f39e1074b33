"""Edges through process groups of two ranks each, which are formed anew when one of the two has a new worker.

The sender computes into a log that its supervisor holds (`workers.slot_log`); a thread sends what the log has from
where the receiver wants it, so that a receiver that comes back is served whatever its neighbour's stage does meanwhile.
What of the log may be overwritten, and when a link is to be formed anew, comes by way of the coordinator.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import EdgeBroken, Kept
from unlocked.runtime.engines.processes.waiting import Waiter, Word
from unlocked.workers.actions import Item
from unlocked.workers.edges import Slot, SlotLayout
from unlocked.workers.errors import LinkLostError
from unlocked.workers.slot_log import SlotLog

__all__ = ["PairInEdge", "PairLink", "PairOutEdge"]

_SENDER, _RECEIVER = 0, 1
_FORM_SECONDS = 1.0  # of one of Gloo's about five attempts to connect; it waits for all of them if the other one dies
_PAUSE = 0.005  # seconds between two looks for the other one
_PATIENCE = 4  # timeouts that a receive may be posted, of which its stage waits for `_ROUNDS` at most
_ROUNDS = 2  # timeouts that a stage waits for a micro-batch: by a silent link, then by that link formed anew
_LONG = 3600.0  # seconds between two looks where every change is told
_DATA, _PLACE = 0, 1  # tags


class PairLink:
    """One worker's end of a link, through all its generations.

    Args:
        store: the run's key-value store, by a connection of the link's own. It is there before the worker says hello:
            once all workers work, nobody new gets to the store.
        edge: the stage that the link leads into.
        side: 0 sends, 1 receives.
        timeout: seconds that the link may be down, and that a message may take.
        neighbour: for errors.
    """

    def __init__(
        self,
        store: dist.Store,
        client: CoordinatorClient,
        *,
        edge: int,
        side: int,
        timeout: float,
        neighbour: str,
    ) -> None:
        self._store, self._client, self._edge, self._side = store, client, edge, side
        self.timeout, self._neighbour = timedelta(seconds=timeout), neighbour
        self._generation = -1
        self._name, self._met = secrets.token_hex(8), b""  # of this worker; of the other end's that was met last
        self.began = time.monotonic()
        """When the other end had its worker, as far as this end knows."""
        self.closing = False
        self.waiter: Waiter | None = None
        """Of the newest group's messages: it is told when that group is of the past."""
        client.on_rejoin.append(self._rejoined)

    @property
    def is_stale(self) -> bool:
        """It is to be formed anew."""
        return self._generation != self._client.generations.get(self._edge, 0)

    def form(self) -> Any:
        """The process group of the newest generation, which is newer than that of the group before: what has broken is
        not tried again, for the dead one's address is still in the store.

        Raises:
            LinkLostError: it could not be formed in time.
            RunFailed: the run is over.
        """
        deadline = time.monotonic() + self.timeout.total_seconds()
        failed = self._generation
        while time.monotonic() < deadline and not self.closing:
            generation = self._client.generations.get(self._edge, 0)
            if generation == failed:
                self._client.await_news(lambda old=failed: self._news(old), 1.0)  # type: ignore[misc]
                continue
            store = dist.PrefixStore(f"edge-{self._edge}/generation-{generation}", self._store)
            if not self._meet(store, generation, deadline):
                continue
            try:
                group = dist.ProcessGroupGloo(store, self._side, 2, timeout=timedelta(seconds=_FORM_SECONDS))
            except RuntimeError:
                failed = generation
                self._client.tell(EdgeBroken(edge=self._edge, generation=generation))
                continue
            self._generation = generation
            return group
        raise LinkLostError(f"the link to {self._neighbour} could not be formed within {self.timeout}")

    def broke(self) -> None:
        """A message has failed: the coordinator is asked for the next generation."""
        self._client.tell(EdgeBroken(edge=self._edge, generation=self._generation))

    def silent(self) -> LinkLostError:
        seconds = _ROUNDS * self.timeout.total_seconds()
        return LinkLostError(f"{self._neighbour} handed nothing on within {seconds:g} s, over a link formed anew, too")

    def lost(self, error: Exception) -> LinkLostError:
        return LinkLostError(f"the link to {self._neighbour} broke ({first_line(error)})")

    def wait(self, group: Any) -> Waiter:
        """Begins to wait for the messages of `group`, the newest one, whose waiter it replaces."""
        if self.waiter is not None:
            self.waiter.close()
        self.waiter = Waiter(group, self.timeout * _PATIENCE)
        return self.waiter

    def next(self) -> bool:
        """Waits for the next message that was added to the waiter, to come or to go; False: not by this group, which is
        broken, of the past or silent, or the link is closing.

        Raises:
            RunFailed: the run is over.
        """
        assert self.waiter is not None
        deadline = time.monotonic() + self.timeout.total_seconds()
        while not (self.closing or self.is_stale):
            left = deadline - time.monotonic()
            word = self.waiter.next_word(min(max(left, 0.0), 1.0))
            if word is None:
                self._client.await_news(lambda: True, 0.0)  # raises
                if left <= 0:  # and a last look was had, as it may be this process that stood still
                    return False
            elif word is not Word.LOOK:
                return word is Word.DONE
        return False

    def _rejoined(self) -> None:
        if self.waiter is not None:
            self.waiter.wake()

    def _news(self, old: int) -> bool:
        return self.closing or self._client.generations.get(self._edge, 0) != old

    def _meet(self, store: dist.Store, generation: int, deadline: float) -> bool:
        """Both are here, and about to connect; False: there is a newer generation, or no time left."""
        store.set(f"here-{self._side}", self._name)
        other = [f"here-{1 - self._side}"]
        while not store.check(other):
            if time.monotonic() > deadline or self._news(generation):
                return False
            self._client.await_news(lambda: self._news(generation), _PAUSE)
        met = store.get(other[0])
        if met != self._met:
            self._met, self.began = met, time.monotonic()
        return True


class PairInEdge:
    """The receiving end. `keeps_log` is always so here."""

    def __init__(
        self, layout: SlotLayout, link: PairLink, client: CoordinatorClient, *, depth: int, slots: int
    ) -> None:
        self._layout, self._link, self._client = layout, link, client
        self._depth, self._slots = depth, slots
        self._free = deque(layout.allocate(torch.device("cpu")) for _ in range(depth))
        self._expected: deque[Item] = deque()
        self._posted: deque[tuple[Item, Tensor]] = deque()
        self._held: deque[Tensor] = deque()
        self._group: Any = None
        self.keeps_log = True
        self.count = 0
        """Micro-batches that this end has released: the number of the next one."""
        self._received = self._kept = 0

    @property
    def unkept(self) -> float:
        """How full the sender's log is, 0 to 1, of micro-batches that wait for `keep`."""
        return (self.count - self._kept) / max(self._slots - self._depth - 2, 1)

    def expect(self, items: Iterable[Item]) -> None:
        self._expected.extend(items)
        if self._group is not None:
            self._post()

    def receive(self, item: Item) -> Slot:
        """Waits for `item`, `_ROUNDS` timeouts at most: a neighbour whose stage stands still while its threads live
        forms every link that it is asked for. One that does a dead one's work again has that time from its beginning.

        Raises:
            LinkLostError: nothing came in time, or the link could not be formed.
        """
        begun = time.monotonic()
        while True:
            if self._group is None or self._link.is_stale:
                self._join()
            expected, slot = self._posted[0]
            assert expected == item, f"expected {expected}, asked for {item}"
            if self._link.next():
                break
            if time.monotonic() - max(begun, self._link.began) >= _ROUNDS * self._link.timeout.total_seconds():
                raise self._link.silent()
            if not self._link.is_stale:
                self._link.broke()
            self._group = None
        self._posted.popleft()
        self._received += 1
        self._held.append(slot)
        return self._layout.views(slot, item.size, item.kind)

    def release(self) -> None:
        self.count += 1
        self._free.append(self._held.popleft())
        if self._group is not None:
            self._post()

    def keep(self) -> None:
        """This stage has saved itself as it is now."""
        self._kept = self.count
        self._client.tell(Kept(count=self.count))

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`."""
        self.count = self._received = self._kept = count

    def _join(self) -> None:
        """Connects, and says which micro-batch is wanted next."""
        deadline = time.monotonic() + self._link.timeout.total_seconds()
        while True:
            self._leave()
            self._group = self._link.form()
            try:
                self._group.send([torch.tensor([self._received])], _SENDER, _PLACE).wait(self._link.timeout)
            except RuntimeError as error:
                self._link.broke()
                if time.monotonic() > deadline:
                    raise self._link.lost(error) from error
                continue
            self._link.wait(self._group)
            self._post()
            if self._posted or not self._expected:
                return
            if time.monotonic() > deadline:
                raise self._link.silent()

    def _leave(self) -> None:
        """What had arrived by the last group is asked for again, into memory that this group can't write to."""
        self._group = None
        while self._posted:
            item, _ = self._posted.pop()
            self._expected.appendleft(item)
            self._free.append(self._layout.allocate(torch.device("cpu")))

    def _post(self) -> None:
        """Receives ahead, as far as there are slots. A link that is broken shows when the next one is waited for."""
        assert self._link.waiter is not None
        while self._free and self._expected:
            item, slot = self._expected[0], self._free[0]
            try:
                work = self._group.recv([self._layout.message(slot, item.size, item.kind)], _SENDER, _DATA)
            except RuntimeError:
                if not self._posted:
                    self._link.broke()
                    self._group = None
                return
            self._expected.popleft()
            self._posted.append((item, self._free.popleft()))
            self._link.waiter.add(work)


class PairOutEdge:
    """The sending end."""

    def __init__(self, log: SlotLog, link: PairLink, client: CoordinatorClient) -> None:
        self.log, self._link, self._client = log, link, client
        self.count = 0
        """Micro-batches that this end has let go: the number of the next one."""
        self._left = 0  # those that the neighbour has taken
        self._signs = 0  # how often it has taken one, be it again
        self._error: BaseException | None = None
        self._scratch: Tensor | None = None
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)

    def start(self) -> None:
        """From here on what the log has is sent."""
        self._thread.start()

    def reserve(self, item: Item) -> Slot:
        if self.count < self.log.sent:  # it is in the log, from a dead incarnation
            if self._scratch is None:
                self._scratch = self.log.layout.allocate(torch.device("cpu"))
            return self.log.layout.views(self._scratch, item.size, item.kind)
        self._wait(self._has_room)
        return self.log.views(self.count, item.size, item.kind)

    def send(self, item: Item) -> None:
        if self.count >= self.log.sent:
            self._wait(lambda: self._left >= self.count)
            self.log.note_length(self.count, self.log.layout.nbytes(item.size, item.kind))
            self.log.sent = self.count + 1
            self._client.wake()
        self.count += 1

    def flush(self) -> None:
        """Waits until the receiver has saved itself after everything: it may need it again until then."""
        self._wait(lambda: self._trim() >= self.count)
        self._link.closing = True
        self._client.wake()

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`: what the log has is computed, but not written again."""
        self.count = count

    def _has_room(self) -> bool:
        self._trim()
        return self.log.has_room(self.count)

    def _trim(self) -> int:
        if self._client.kept > self.log.kept:
            self.log.kept = self._client.kept
        return self.log.kept

    def _wait(self, ready: Callable[[], bool]) -> None:
        timeout = self._link.timeout.total_seconds()
        signs, done = -1, False
        while not done and signs != self._signs:  # whoever does a dead one's work again takes what it had before
            signs = self._signs
            done = self._client.await_news(lambda: self._error is not None or ready(), timeout)
        if self._error is not None:
            raise self._error
        if not done:
            raise LinkLostError(f"nothing was taken from the link within {timeout:g} s")

    # --- in the thread

    def _run(self) -> None:
        try:
            while not self._link.closing:
                self._serve()
        except BaseException as error:  # raised where the stage waits
            if not self._link.closing:
                self._error = error
                self._client.wake()
        finally:
            if self._link.waiter is not None:
                self._link.waiter.close()

    def _serve(self) -> None:
        """One generation of the link, to its end."""
        group = self._link.form()
        waiter = self._link.wait(group)
        try:
            place = torch.zeros(1, dtype=torch.int64)
            group.recv([place], _RECEIVER, _PLACE).wait(self._link.timeout)
            number = int(place)
            self._took(number)
            while True:
                self._client.await_news(lambda: self._is_due(number), _LONG)  # noqa: B023 - called at once
                if self._link.closing or self._link.is_stale:
                    return
                if not self.log.has(number):
                    continue  # nothing in so long
                waiter.add(group.send([self.log.message(number)], _RECEIVER, _DATA))
                if not self._link.next():
                    if not (self._link.closing or self._link.is_stale):
                        self._link.broke()
                    return
                number += 1
                self._took(number)
        except RuntimeError:
            self._link.broke()

    def _is_due(self, number: int) -> bool:
        return self._link.closing or self._link.is_stale or self.log.has(number)

    def _took(self, number: int) -> None:
        self._left = max(self._left, number)
        self._signs += 1
        self._client.wake()
