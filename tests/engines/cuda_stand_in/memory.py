"""The memory of the device that the stand-in is, and page-locked memory of the host: blocks at fixed addresses.

As in torch's allocator, a block that the host lets go is given out again at once, to the same stream: outside of graphs
from one store per stream, inside from the graph's pool. So an access that the order of one stream does not cover shows,
and what is captured can be run again by its addresses. Page-locked blocks are never given out again.
"""

import ctypes
import mmap
import weakref
from bisect import bisect_right
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from cuda_stand_in.order import Accesses
from torch import Tensor

__all__ = ["Block", "Memory"]

_SIZE = 1 << 31  # bytes of address space; what is not used takes no memory
_ALIGNMENT = 512  # bytes, as torch's allocator aligns


@dataclass(slots=True, eq=False)
class Block:
    """A piece of memory that is given out as a whole.

    Attributes:
        home: whose free list it goes back to; None: page-locked memory of the host.
        is_float: whether it last held floating-point numbers.
    """

    start: int
    size: int
    home: Hashable
    is_float: bool = False
    accesses: Accesses = field(default_factory=Accesses)

    @property
    def is_device(self) -> bool:
        return self.home is not None


class Memory:
    """Gives out blocks as tensors, and finds the block that a tensor lies in."""

    def __init__(self) -> None:
        self._map = mmap.mmap(
            -1, _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        )
        self._base = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map))
        self._starts: list[int] = []
        self._blocks: list[Block] = []
        self._free: dict[tuple[Hashable, int], list[Block]] = {}
        self._given: dict[int, Any] = {}
        self._end = 0

    def empty(self, size: Any, stride: Any, dtype: torch.dtype, home: Hashable) -> tuple[Tensor, Block]:
        """An uninitialised tensor in a block of its own, which is free again when nothing refers to its storage."""
        extent = _extent(size, stride)
        nbytes = max(extent, 1) * dtype.itemsize
        block = self._take(-(-nbytes // _ALIGNMENT) * _ALIGNMENT, home)
        block.is_float = dtype.is_floating_point
        # The storage holds `place`, so `place` dies with the storage.
        place: Any = (ctypes.c_ubyte * nbytes).from_address(self._base + block.start)
        place.memory = self._map
        key = id(place)
        self._given[key] = weakref.ref(place, lambda _: self._let_go(key, block))
        return torch.frombuffer(place, dtype=dtype).as_strided(size, stride), block

    def block_of(self, tensor: Tensor) -> Block | None:
        """None: ordinary memory of the host."""
        offset = tensor.untyped_storage().data_ptr() - self._base
        if not 0 <= offset < self._end:
            return None
        return self._blocks[bisect_right(self._starts, offset) - 1]

    def by_address(self, tensor: Tensor) -> Tensor:
        """The same bytes, without keeping their block."""
        extent = _extent(tensor.size(), tensor.stride())
        if not extent:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        offset = tensor.data_ptr() - self._base
        flat = torch.frombuffer(self._map, dtype=tensor.dtype, count=extent, offset=offset)
        return flat.as_strided(tensor.size(), tensor.stride())

    def content(self, block: Block) -> bytes:
        return self._map[block.start : block.start + block.size]

    def fill(self, block: Block, content: bytes) -> None:
        self._map[block.start : block.start + block.size] = content

    def spoil(self, block: Block) -> None:
        """NaN in every float type."""
        self.fill(block, b"\xff" * block.size)

    @property
    def used(self) -> int:
        """Bytes of address space that were ever given out."""
        return self._end

    def _take(self, size: int, home: Hashable) -> Block:
        free = self._free.get((home, size)) if home is not None else None
        if free:
            return free.pop()
        block = Block(self._end, size, home)
        self._end += size
        assert self._end <= _SIZE, "the stand-in's memory is used up"
        self._starts.append(block.start)
        self._blocks.append(block)
        return block

    def _let_go(self, key: int, block: Block) -> None:
        del self._given[key]
        if block.home is not None:
            self._free.setdefault((block.home, block.size), []).append(block)


def _extent(size: Any, stride: Any) -> int:
    """Elements from the first to the last."""
    if any(n == 0 for n in size):
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
