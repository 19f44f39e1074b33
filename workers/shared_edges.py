"""Edges between two processes of one machine: slots in shared memory, a Unix socket to wake the neighbour.

The receiver makes the ring and lends its slots; the sender computes an output straight into the next one and counts it,
the receiver works on it in place and counts it as done (`workers.slot_log`). A byte on the socket says that a count has
grown; what counts is the memory, so that a byte may be lost or come twice. Nothing is copied, and a neighbour's death
is an end-of-file, seen at once. A hop costs two small system calls, where Gloo's handshakes over TCP take about a
millisecond on a busy two-core machine (`benchmarks/pipeline_scaling.py`).

Where workers are recovered, the ring has room for more than the neighbour may be ahead: what lies in it is kept until
the receiver has saved itself, and a supervisor holds memory and socket open while a worker is replaced.
"""

import contextlib
import errno
import mmap
import os
import select
import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from unlocked.workers.actions import Item
from unlocked.workers.edges import Slot, SlotLayout
from unlocked.workers.errors import LinkLostError
from unlocked.workers.slot_log import SlotLog

__all__ = ["NoRoomError", "SharedInEdge", "SharedListener", "SharedOutEdge"]


class NoRoomError(OSError):
    """There is no place for an edge's ring; says what it needs and what is free where."""


class SharedListener:
    """The receiver's side before the sender has come: makes the ring and waits at a socket.

    The ring's memory is taken here and not when a slot is first written, where the lack of it would be the end of the
    process without a word.

    Args:
        depth: micro-batches that the sender may be ahead.
        timeout: seconds to wait for the neighbour, now and later.
        log_slots: how many slots the ring should have, if there is room for them; it has `depth` + 1 at least.

    Raises:
        NoRoomError: no place has room for the ring.
    """

    def __init__(self, layout: SlotLayout, *, depth: int, timeout: float, log_slots: int = 0) -> None:
        self._layout, self._depth, self._timeout = layout, depth, timeout
        wanted = max(log_slots, depth + 1)
        while True:
            try:
                self._folder, self._memory = _reserve(SlotLog.nbytes(layout, wanted))
                break
            except NoRoomError:
                if wanted == depth + 1:
                    raise
                wanted = max(wanted // 4, depth + 1)
        self.slots = wanted
        """Of the ring."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(timeout)
        try:
            self._listener.bind(str(Path(self._folder) / "link"))
            self._listener.listen(1)
        except OSError:
            self.close()
            raise

    @property
    def address(self) -> str:
        """What the sender needs, beside the number of slots."""
        return self._folder

    def accept(self, neighbour: str) -> "SharedInEdge":
        """Waits for the sender, then removes every name from the file system: nothing outlives the processes.

        Raises:
            LinkLostError: the sender did not come in time.
        """
        try:
            link, _ = self._listener.accept()
        except OSError as error:
            raise LinkLostError(f"{neighbour} did not connect within {self._timeout:g} s") from error
        finally:
            self.close()
        log = SlotLog(self._memory, self._layout, self.slots)
        return SharedInEdge(log, _Link(link, neighbour, self._timeout), self._depth)

    def close(self) -> None:
        """Idempotent."""
        self._listener.close()
        for name in ("link", "ring"):
            with contextlib.suppress(OSError):
                os.unlink(Path(self._folder) / name)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)


class SharedInEdge:
    """The receiving end. Micro-batches are numbered in the order of the stream, so nothing but counts has to be told.

    `keeps_log` (False at first): slots stay as they are until `keep` says otherwise.
    """

    def __init__(self, log: SlotLog, link: "_Link", depth: int) -> None:
        self.log, self._link, self._depth = log, link, depth
        self.keeps_log = False
        self.fill = 0.0
        """Moving average of the share of slots that were full when the stage asked for the next one."""
        self.count = 0
        """Micro-batches that this end has released: the number of the next one."""
        self._next = 0
        self._expected: deque[Item] = deque()

    @property
    def unkept(self) -> float:
        """How full the log is, 0 to 1, of micro-batches that wait for `keep`; 1: the sender will soon have to wait."""
        return (self.count - self.log.kept) / max(self.log.slots - self._depth - 1, 1)

    def expect(self, items: Iterable[Item]) -> None:
        self._expected.extend(items)

    def receive(self, item: Item) -> Slot:
        expected = self._expected.popleft()
        assert expected == item, f"expected {expected}, asked for {item}"
        number = self._next
        self.fill += 0.1 * (min((self.log.sent - number) / self._depth, 1.0) - self.fill)
        self._link.wait_until(lambda: self.log.has(number))
        self._next += 1
        return self.log.views(number, item.size, item.kind)

    def release(self) -> None:
        self.count += 1
        if self.count > self.log.done:  # not so where a dead incarnation's work is done again
            self.log.done = self.count
        if not self.keeps_log:
            self.log.kept = self.count
        self._link.wake()

    def keep(self) -> None:
        """This stage has saved itself as it is now: it will never ask again for what it has released."""
        self.log.kept = self.count
        self._link.wake()

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`, which is still kept."""
        self.count = self._next = count


class SharedOutEdge:
    """The sending end.

    Args:
        address: the receiver's.
        slots: of its ring; default: `depth` + 1.
    """

    def __init__(
        self,
        layout: SlotLayout,
        address: str,
        *,
        depth: int,
        timeout: float,
        neighbour: str,
        slots: int | None = None,
    ) -> None:
        slots = depth + 1 if slots is None else slots
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with open(Path(address) / "ring", "r+b") as file:
                memory = mmap.mmap(file.fileno(), SlotLog.nbytes(layout, slots))
            link.settimeout(timeout)
            link.connect(str(Path(address) / "link"))
        except (OSError, ValueError) as error:
            link.close()
            raise LinkLostError(f"can't reach {neighbour} ({error})") from error
        self.log, self._link, self._depth = SlotLog(memory, layout, slots), _Link(link, neighbour, timeout), depth
        self.count = 0
        """Micro-batches that this end has let go: the number of the next one."""
        self._scratch: Tensor | None = None

    def reserve(self, item: Item) -> Slot:
        if self.count < self.log.sent:  # the neighbour has it from a dead incarnation, and may be reading it
            if self._scratch is None:
                layout = self.log.layout
                self._scratch = layout.allocate(self.log.slot(0).device)
            return self.log.layout.views(self._scratch, item.size, item.kind)
        # Always there, but for a log that is full: then the neighbour is about to save itself.
        self._link.wait_until(lambda: self.log.has_room(self.count))
        return self.log.views(self.count, item.size, item.kind)

    def send(self, item: Item) -> None:
        if self.count >= self.log.sent:
            self._link.wait_until(lambda: self.count - self.log.done < self._depth)
            self.log.sent = self.count + 1
        self._link.wake()  # a dead incarnation may have counted it, and not have come to this
        self.count += 1

    def flush(self) -> None:
        """Waits until the receiver has done everything."""
        self._link.wait_until(lambda: self.log.done >= self.count)

    def go_back(self, count: int) -> None:
        """Begins again with micro-batch `count`: what the neighbour has already is computed, but not sent again."""
        self.count = count

    def close(self) -> None:
        """Lets the neighbour go; for edges that are not used after all."""
        self._link.close()


class _Link:
    """A socket whose bytes mean: look at the counts again."""

    def __init__(self, link: socket.socket, neighbour: str, timeout: float) -> None:
        self._link, self._neighbour, self._timeout = link, neighbour, timeout
        link.setblocking(False)
        self._arrival = select.poll()  # unlike `select.select` it takes descriptors above 1023
        self._arrival.register(link, select.POLLIN)

    def wake(self) -> None:
        """Tells the neighbour, if it is there: its end is noticed where it is waited for."""
        with contextlib.suppress(OSError):  # or so many wake it already
            self._link.send(b"\0")

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Waits for a count, as long as there are signs of the neighbour's: it may be doing a dead one's work again.

        Raises:
            LinkLostError: the neighbour's end is gone, or nothing came in time.
        """
        if ready():
            return
        deadline = time.monotonic() + self._timeout
        is_open = True
        while not ready():
            if not is_open:
                raise LinkLostError(f"the link to {self._neighbour} broke (its process ended)")
            left = deadline - time.monotonic()
            if not self._arrival.poll(1000 * max(left, 0.0)):
                if left <= 0:  # and a last look, as it may be this process that stood still
                    raise LinkLostError(f"{self._neighbour} did not answer within {self._timeout:g} s")
            else:
                is_open = self._take()  # what was counted before an end still counts
                deadline = time.monotonic() + self._timeout

    def close(self) -> None:
        self._link.close()

    def _take(self) -> bool:
        """False: the neighbour's end is closed."""
        try:
            return bool(self._link.recv(4096))
        except BlockingIOError:
            return True
        except OSError:
            return False


def _reserve(size: int) -> tuple[str, mmap.mmap]:
    """A new folder with a file `ring` of `size` bytes, all of which exist; and the file's memory.

    Raises:
        NoRoomError: there is no such place.
    """
    problems = []
    for place in memory_folders():
        folder = None
        try:
            folder = tempfile.mkdtemp(prefix="unlocked-", dir=place)
            with open(Path(folder) / "ring", "w+b") as file:
                _allocate(file.fileno(), size)
                return folder, mmap.mmap(file.fileno(), size)
        except OSError as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            why = f"{shutil.disk_usage(place).free} are free" if error.errno in _FULL else error.strerror
            problems.append(f"in {place} {why}")
    where = "; ".join(problems) or "there is no folder in memory that can be written"
    raise NoRoomError(f"{size} bytes of shared memory are needed: {where}")


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, 1 << 20):  # macOS: what is written is there
        os.pwrite(descriptor, bytes(min(1 << 20, size - start)), start)


def memory_folders() -> list[str]:
    """Where files are memory without a disk behind it: /dev/shm, then the temporary folder if it is of that kind; where
    the system has no such kind (macOS), the temporary folder as it is."""
    folders = ["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []
    temporary = tempfile.gettempdir()
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return [*folders, temporary]
    kinds = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}  # the latest mount counts
    home = next(str(p) for p in (Path(temporary).resolve(), *Path(temporary).resolve().parents) if str(p) in kinds)
    return list(dict.fromkeys([*folders, temporary])) if kinds[home] in ("tmpfs", "ramfs") else folders
