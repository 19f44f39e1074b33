"""A stage's own snapshot, in memory that outlives its worker: where the next incarnation begins.

It is not one of the run's snapshots: no other stage takes part, nothing is written to a disk, and it goes with the
supervisor that holds the memory. Two places are written in turn, and a single number says which one counts, so that a
worker may die at any moment of writing.
"""

import mmap
import os
import pickle
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

__all__ = ["MemorySnapshot"]

_CURRENT, _LENGTH, _REACHED = 0, 1, 3  # places in the page of numbers; two lengths
_ALIGNMENT = 64


class MemorySnapshot:
    """Made by the supervisor; every worker of the stage inherits it."""

    def __init__(self) -> None:
        self._numbers = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._files = [os.memfd_create(f"unlocked-stage-{place}") for place in range(2)]
        self._memory: list[mmap.mmap | None] = [None, None]
        self.nbytes = 0
        """Of the latest one that this process has written."""

    @property
    def reached(self) -> int:
        """The position to which the stage's workers have come; items before it are done."""
        return self._numbers[_REACHED]

    @reached.setter
    def reached(self, position: int) -> None:
        self._numbers[_REACHED] = position

    def write(self, state: dict[str, Any]) -> None:
        """Copies `state`, of which tensors keep their types, shapes and strides; it counts once this returns.

        Raises:
            OSError: there is no memory for it.
        """
        place = 1 if self._numbers[_CURRENT] == 1 else 0  # the one that does not count
        pickler = _Pickler(text := BytesIO())
        pickler.dump(state)
        head = pickle.dumps((text.getvalue(), pickler.layouts))
        begin = _aligned(len(head))
        self.nbytes = begin + pickler.nbytes
        memory = self._grown(place, self.nbytes)
        memory[: len(head)] = head
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        for tensor, layout in zip(pickler.tensors, pickler.layouts, strict=True):
            _view(whole, begin, layout).copy_(tensor)
        self._numbers[_LENGTH + place] = len(head)
        self._numbers[_CURRENT] = place + 1

    def read(self) -> dict[str, Any] | None:
        """What was written last, as tensors of its own; None: nothing yet."""
        current = self._numbers[_CURRENT]
        if not current:
            return None
        place = current - 1
        length = self._numbers[_LENGTH + place]
        with mmap.mmap(self._files[place], os.fstat(self._files[place]).st_size) as memory:
            text, layouts = pickle.loads(memory[:length])
            copy = torch.frombuffer(bytearray(memory), dtype=torch.uint8)
        tensors = [_view(copy, _aligned(length), layout).clone() for layout in layouts]
        state: dict[str, Any] = _Unpickler(BytesIO(text), tensors).load()
        return state

    def close(self) -> None:
        """Gives the memory back, once no worker has it any more. Idempotent."""
        for file in self._files:
            os.close(file)
        self._files = []

    def _grown(self, place: int, size: int) -> mmap.mmap:
        memory = self._memory[place]
        if memory is None or len(memory) < size:
            size = size + size // 8
            os.posix_fallocate(self._files[place], 0, size)
            memory = self._memory[place] = mmap.mmap(self._files[place], os.fstat(self._files[place]).st_size)
        return memory


_Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""Type, shape, strides, and the first byte."""


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.layouts: list[_Layout] = []
        self.nbytes = 0

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        strides = torch.empty_like(value, device="meta").stride()  # dense, in the same order
        self.tensors.append(value.detach())
        self.layouts.append((value.dtype, tuple(value.shape), strides, self.nbytes))
        self.nbytes += _aligned(value.numel() * value.element_size())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        return self._tensors[place]


def _view(memory: Tensor, begin: int, layout: _Layout) -> Tensor:
    dtype, shape, strides, offset = layout
    count = 1
    for length in shape:
        count *= length
    start = begin + offset
    return memory[start : start + count * dtype.itemsize].view(dtype).as_strided(shape, strides)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
