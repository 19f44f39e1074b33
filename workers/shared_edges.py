"""Edges between two processes of one machine: slots in shared memory, one byte on a Unix socket per slot.

The receiver owns the ring and lends its slots; the sender computes an output straight into the next one and sends a
byte, the receiver works on it in place and sends a byte back when it is done. The ring has one slot more than the
receiver may hold: the one that the sender writes meanwhile. Nothing is copied, and a neighbour's death is an
end-of-file, seen at once. A hop costs two small system calls, where Gloo's handshakes over TCP take about a millisecond
on a busy two-core machine (`benchmarks/pipeline_scaling.py`).
"""

import contextlib
import errno
import mmap
import os
import select
import shutil
import socket
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from unlocked.workers.actions import Item
from unlocked.workers.edges import Slot, SlotLayout
from unlocked.workers.errors import LinkLostError

__all__ = ["NoRoomError", "SharedInEdge", "SharedListener", "SharedOutEdge"]

_PAGE = mmap.PAGESIZE


class NoRoomError(OSError):
    """There is no place for an edge's ring; says what it needs and what is free where."""


class SharedListener:
    """The receiver's side before the sender has come: makes the ring and waits at a socket.

    The ring's memory is taken here and not when a slot is first written, where the lack of it would be the end of the
    process without a word.

    Args:
        depth: micro-batches that the sender may be ahead.
        timeout: seconds to wait for the neighbour, now and later.

    Raises:
        NoRoomError: no place has room for the ring.
    """

    def __init__(self, layout: SlotLayout, *, depth: int, timeout: float) -> None:
        self._layout, self._slots, self._timeout = layout, depth + 1, timeout
        size = self._slots * _slot_bytes(layout)
        self._folder, self._memory = _reserve(size)
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
        """What the sender needs."""
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
        return SharedInEdge(self._layout, self._memory, link, self._slots, self._timeout, neighbour)

    def close(self) -> None:
        """Idempotent."""
        self._listener.close()
        for name in ("link", "ring"):
            with contextlib.suppress(OSError):
                os.unlink(Path(self._folder) / name)
        with contextlib.suppress(OSError):
            os.rmdir(self._folder)


class SharedInEdge:
    """The receiving end. Slots are used in the order of the stream, so nothing but their count has to be told."""

    def __init__(
        self,
        layout: SlotLayout,
        memory: mmap.mmap,
        link: socket.socket,
        slots: int,
        timeout: float,
        neighbour: str,
    ) -> None:
        self._layout, self._slots = layout, _slots(layout, memory, slots)
        self._link, self._neighbour, self._timeout = link, neighbour, timeout
        link.settimeout(timeout)
        self._waiting = select.poll()  # unlike `select.select` it takes descriptors above 1023
        self._waiting.register(link, select.POLLIN)
        self.fill = 0.0
        """Moving average of the share of slots that were full when the stage asked for the next one."""
        self._arrived = 0
        self._next = 0
        self._expected: deque[Item] = deque()

    def expect(self, items: Iterable[Item]) -> None:
        self._expected.extend(items)

    def receive(self, item: Item) -> Slot:
        expected = self._expected.popleft()
        assert expected == item, f"expected {expected}, asked for {item}"
        if self._waiting.poll(0):  # a flag of recv would not do: a socket with a timeout waits first
            self._arrived += _count_waiting(self._link)
        self.fill += 0.1 * (self._arrived / (len(self._slots) - 1) - self.fill)
        while not self._arrived:
            self._arrived += _count_bytes(self._link, self._neighbour, self._timeout)
        self._arrived -= 1
        slot = self._slots[self._next % len(self._slots)]
        self._next += 1
        return self._layout.views(slot, item.size, item.kind)

    def release(self) -> None:
        _send_byte(self._link, self._neighbour)


class SharedOutEdge:
    """The sending end.

    Args:
        address: the receiver's.
    """

    def __init__(self, layout: SlotLayout, address: str, *, depth: int, timeout: float, neighbour: str) -> None:
        self._layout, self._neighbour, self._timeout = layout, neighbour, timeout
        size = (depth + 1) * _slot_bytes(layout)
        self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with open(Path(address) / "ring", "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), size)
            self._link.settimeout(timeout)
            self._link.connect(str(Path(address) / "link"))
        except (OSError, ValueError) as error:
            self._link.close()
            raise LinkLostError(f"can't reach {neighbour} ({error})") from error
        self._slots = _slots(layout, self._memory, depth + 1)
        self._depth = self._free = depth  # slots that the receiver has not been given
        self._next = 0

    def reserve(self, item: Item) -> Slot:
        return self._layout.views(self._slots[self._next % len(self._slots)], item.size, item.kind)

    def send(self, item: Item) -> None:
        self._await_free(1)
        self._free -= 1
        self._next += 1
        _send_byte(self._link, self._neighbour)

    def flush(self) -> None:
        """Waits until the receiver has done everything."""
        self._await_free(self._depth)

    def close(self) -> None:
        """Lets the neighbour go; for edges that are not used after all."""
        self._link.close()

    def _await_free(self, count: int) -> None:
        while self._free < count:
            self._free += _count_bytes(self._link, self._neighbour, self._timeout)


def _slots(layout: SlotLayout, memory: mmap.mmap, count: int) -> list[Tensor]:
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    size = _slot_bytes(layout)
    return [whole[i * size : (i + 1) * size] for i in range(count)]


def _slot_bytes(layout: SlotLayout) -> int:
    """A slot begins on a page, so that the activations in it are aligned as torch's own."""
    return -(-layout.capacity // _PAGE) * _PAGE


def _reserve(size: int) -> tuple[str, mmap.mmap]:
    """A new folder with a file `ring` of `size` bytes, all of which exist; and the file's memory.

    Raises:
        NoRoomError: there is no such place.
    """
    problems = []
    for place in _memory_folders():
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


def _memory_folders() -> list[str]:
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


def _count_bytes(link: socket.socket, neighbour: str, timeout: float) -> int:
    """How many slots the neighbour has filled or freed; waits for at least one."""
    try:
        received = len(link.recv(4096))
    except TimeoutError as error:
        raise LinkLostError(f"{neighbour} did not answer within {timeout:g} s") from error
    except OSError as error:
        raise LinkLostError(f"the link to {neighbour} broke ({error})") from error
    if not received:
        raise LinkLostError(f"the link to {neighbour} broke (its process ended)")
    return received


def _count_waiting(link: socket.socket) -> int:
    """The same where something has come; what is wrong with the link shows when it is waited for."""
    with contextlib.suppress(OSError):
        return len(link.recv(4096))
    return 0


def _send_byte(link: socket.socket, neighbour: str) -> None:
    try:
        link.send(b"\0")
    except OSError as error:
        raise LinkLostError(f"the link to {neighbour} broke ({error})") from error
