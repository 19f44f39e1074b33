"""Edges between two processes of one machine: slots in shared memory, one byte on a Unix socket per slot.

The receiver owns the ring and lends its slots; the sender computes an output straight into the next one and sends a
byte, the receiver works on it in place and sends a byte back when it is done. The ring has one slot more than the
receiver may hold: the one that the sender writes meanwhile. Nothing is copied, and a neighbour's death is an
end-of-file, seen at once. A hop costs two small system calls, where Gloo's handshakes over TCP take about a millisecond
on a busy two-core machine (`benchmarks/pipeline_scaling.py`).
"""

import contextlib
import mmap
import os
import select
import socket
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError

__all__ = ["SharedInEdge", "SharedListener", "SharedOutEdge"]

_PAGE = mmap.PAGESIZE


class SharedListener:
    """The receiver's side before the sender has come: makes the ring and waits at a socket.

    Args:
        depth: micro-batches that the sender may be ahead.
        timeout: seconds to wait for the neighbour, now and later.
    """

    def __init__(self, layout: SlotLayout, *, depth: int, timeout: float) -> None:
        self._layout, self._slots, self._timeout = layout, depth + 1, timeout
        self._folder = tempfile.mkdtemp(prefix="unlocked-", dir=_memory_folder())
        size = self._slots * _slot_bytes(layout)
        with open(self._ring_path, "w+b") as file:
            file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.settimeout(timeout)
        self._listener.bind(str(Path(self._folder) / "link"))
        self._listener.listen(1)

    @property
    def address(self) -> str:
        """What the sender needs."""
        return self._folder

    @property
    def _ring_path(self) -> str:
        return str(Path(self._folder) / "ring")

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
        self.fill = 0.0
        """Moving average of the share of slots that were full when the stage asked for the next one."""
        self._arrived = 0
        self._next = 0
        self._expected: deque[Item] = deque()

    def expect(self, items: Iterable[Item]) -> None:
        self._expected.extend(items)

    def receive(self, item: Item) -> tuple[Tensor, Tensor]:
        expected = self._expected.popleft()
        assert expected == item, f"expected {expected}, asked for {item}"
        self._arrived += _count_waiting(self._link)
        self.fill += 0.1 * (self._arrived / (len(self._slots) - 1) - self.fill)
        while not self._arrived:
            self._arrived += _count_bytes(self._link, self._neighbour, self._timeout)
        self._arrived -= 1
        slot = self._slots[self._next % len(self._slots)]
        self._next += 1
        return self._layout.views(slot, item.size)

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
        try:
            with open(Path(address) / "ring", "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), size)
            self._link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._link.settimeout(timeout)
            self._link.connect(str(Path(address) / "link"))
        except (OSError, ValueError) as error:
            raise LinkLostError(f"can't reach {neighbour} ({error})") from error
        self._slots = _slots(layout, self._memory, depth + 1)
        self._depth = self._free = depth  # slots that the receiver has not been given
        self._next = 0

    def reserve(self, item: Item) -> tuple[Tensor, Tensor]:
        return self._layout.views(self._slots[self._next % len(self._slots)], item.size)

    def send(self, item: Item) -> None:
        self._await_free(1)
        self._free -= 1
        self._next += 1
        _send_byte(self._link, self._neighbour)

    def flush(self) -> None:
        """Waits until the receiver has done everything."""
        self._await_free(self._depth)

    def _await_free(self, count: int) -> None:
        while self._free < count:
            self._free += _count_bytes(self._link, self._neighbour, self._timeout)


def _slots(layout: SlotLayout, memory: mmap.mmap, count: int) -> list[Tensor]:
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    size = _slot_bytes(layout)
    return [whole[i * size : (i + 1) * size] for i in range(count)]


def _slot_bytes(layout: SlotLayout) -> int:
    """A slot begins on a page, so that the activations in it are aligned as torch's own."""
    return -(-layout.nbytes(layout.max_rows) // _PAGE) * _PAGE


def _memory_folder() -> str | None:
    """/dev/shm where there is one: memory without a disk behind it. Elsewhere the system's temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


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
    """The same without waiting; what is wrong with the link shows when it is waited for."""
    if not select.select([link], [], [], 0)[0]:  # a flag of recv would not do: a socket with a timeout waits first
        return 0
    with contextlib.suppress(OSError):
        return len(link.recv(4096))
    return 0


def _send_byte(link: socket.socket, neighbour: str) -> None:
    try:
        link.send(b"\0")
    except OSError as error:
        raise LinkLostError(f"the link to {neighbour} broke ({error})") from error
