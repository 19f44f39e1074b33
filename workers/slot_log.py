"""The slots of an edge, in memory that outlives the processes at its ends: what was sent is kept there until the
receiver will never ask for it again.

This is the log of sender-based message logging (Elnozahy, Alvisi, Wang, Johnson 2002, "A Survey of Rollback-Recovery
Protocols in Message-Passing Systems", section 3): the sender computes an output straight into the log's next slot, and
a receiver that comes back after a crash reads again from where its last snapshot stands. Nothing is copied for it.
"""

import contextlib
import mmap
import sys
import threading

import torch
from torch import Tensor

from unlocked.workers.actions import ItemKind
from unlocked.workers.edges import Slot, SlotLayout

__all__ = ["SlotLog"]

_PAGE = mmap.PAGESIZE
_MADV_POPULATE_READ = 22  # <asm-generic/mman-common.h>
_SENT, _DONE, _KEPT, _COUNTS = range(4)  # places in the header; behind the last one, every slot's length
_HANDSHAKE = threading.Lock()


class SlotLog:
    """A ring of slots behind some pages of counts. The micro-batch number n of the edge lies in slot n mod `slots`.

    Counts only grow, and each has one writer: `sent` the sender; `done` and `kept` the receiver. They are written in
    one piece, after what they stand for, so that whoever takes a dead process's place finds everything as it was left.

    Args:
        memory: of `nbytes(layout, slots)` bytes, shared by all who use the edge; zeros at first.
    """

    def __init__(self, memory: mmap.mmap, layout: SlotLayout, slots: int) -> None:
        self.layout, self.slots, self._memory = layout, slots, memory
        head = _head_bytes(slots)
        self._counts = memoryview(memory)[:head].cast("Q")
        whole, size = torch.frombuffer(memory, dtype=torch.uint8)[head:], self.slot_bytes(layout)
        self._slots = [whole[i * size : (i + 1) * size] for i in range(slots)]

    @staticmethod
    def slot_bytes(layout: SlotLayout) -> int:
        """A slot begins on a page, so that the activations in it are aligned as torch's own."""
        return -(-layout.capacity // _PAGE) * _PAGE

    @classmethod
    def nbytes(cls, layout: SlotLayout, slots: int) -> int:
        """Bytes of memory that the log takes."""
        return _head_bytes(slots) + slots * cls.slot_bytes(layout)

    def map_in(self) -> None:
        """Has the system map the whole ring into this process now (Linux 5.14 and later; madvise(2)), instead of page
        by page as the stream comes by: to write 2 MiB took 0.8 ms the first time, and 0.14 ms again."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an older one: as the stream comes by
                self._memory.madvise(_MADV_POPULATE_READ)

    @property
    def sent(self) -> int:
        """Micro-batches that the sender has let go."""
        return self._counts[_SENT]

    @sent.setter
    def sent(self, count: int) -> None:
        _order_memory()
        self._counts[_SENT] = count

    @property
    def done(self) -> int:
        """Micro-batches that the receiver has worked through, in whichever incarnation came furthest."""
        return self._counts[_DONE]

    @done.setter
    def done(self, count: int) -> None:
        _order_memory()
        self._counts[_DONE] = count

    @property
    def kept(self) -> int:
        """The first micro-batch that the receiver may ask for again; slots of earlier ones are free."""
        return self._counts[_KEPT]

    @kept.setter
    def kept(self, count: int) -> None:
        _order_memory()
        self._counts[_KEPT] = count

    def has(self, number: int) -> bool:
        """Whether micro-batch `number` can be read."""
        if number >= self.sent:
            return False
        _order_memory()
        return True

    def has_room(self, number: int) -> bool:
        """Whether micro-batch `number` can be written: nobody will ask for what lies in its slot."""
        return number - self.kept < self.slots

    def message(self, number: int) -> Tensor:
        """The bytes of micro-batch `number` that travel, as many as its sender has noted."""
        return self.slot(number)[: self._counts[_COUNTS + number % self.slots]]

    def note_length(self, number: int, nbytes: int) -> None:
        """For whoever sends it again; before it counts as sent."""
        self._counts[_COUNTS + number % self.slots] = nbytes

    def slot(self, number: int) -> Tensor:
        return self._slots[number % self.slots]

    def views(self, number: int, rows: int, kind: ItemKind = "train") -> Slot:
        """What passes, and labels [rows], of micro-batch `number`."""
        return self.layout.views(self.slot(number), rows, kind)


def _head_bytes(slots: int) -> int:
    return -(-8 * (_COUNTS + slots) // _PAGE) * _PAGE


def _order_memory() -> None:
    """What was written or read before stays before what comes after, also on processors that reorder stores (ARM): a
    release followed by an acquire of one lock is kept in order by all of them. About 0.1 us."""
    for _ in range(2):
        with _HANDSHAKE:
            pass
