"""What passes between two stages where a rule needs more than activations and labels: rows of views, a side channel.

Every shape is known at set-up and depends on the item's kind alone, so slots keep their fixed size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.rules import CLASS_NUMBER, Carried, TargetForm
from unlocked.workers.actions import Item, ItemKind
from unlocked.workers.edges import Slot, SlotLayout
from unlocked.workers.ring import Ring

__all__ = ["READ_OUT", "Cargo", "CargoLayout", "CargoRing", "Freight", "Traffic", "make_layout", "packed", "write"]

READ_OUT = "read_out"
"""The side channel's name, in evaluation, for the running sum of the layers' scores."""

_ALIGNMENT = 64  # bytes: a tensor begins on a cache line, as torch's own allocations do


class Cargo(NamedTuple):
    """A micro-batch's activations [rows, ...] and what travels beside them."""

    activations: Tensor
    carried: Mapping[str, Tensor]


def packed(activations: Tensor, carried: Mapping[str, Tensor]) -> Any:
    """What passes: the activations alone where nothing is beside them."""
    return Cargo(activations, carried) if carried else activations


class Freight(NamedTuple):
    """What an item of one kind brings over an edge besides one row of activations for each sample."""

    views: int = 1
    """Rows of activations per sample."""
    carried: Mapping[str, Carried] = {}


Traffic = Mapping[ItemKind, Freight]
"""By the item's kind; empty: activations and labels and nothing else."""

_NOTHING = Freight()


@dataclass(frozen=True, slots=True)
class CargoLayout(SlotLayout):
    """A slot's bytes with traffic: the labels, the side channel's tensors, the activations."""

    traffic: Traffic = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Of the largest micro-batch of any kind."""
        return max(self.nbytes(self.max_rows, kind) for kind in self.traffic)

    def nbytes(self, rows: int, kind: ItemKind = "train") -> int:
        freight = self.traffic.get(kind, _NOTHING)
        activations = rows * freight.views * prod(self.sample_shape) * self.dtype.itemsize
        return self._targets_bytes(rows) + _bytes_beside(freight, rows) + activations

    def views(self, slot: Tensor, rows: int, kind: ItemKind = "train") -> Slot:
        """A `Cargo` with activations [rows * views, *sample_shape], and targets [rows, ...], as views of the slot."""
        freight = self.traffic.get(kind, _NOTHING)
        beside = self._targets_bytes(rows)
        begin = beside + _bytes_beside(freight, rows)
        flat = slot[begin : self.nbytes(rows, kind)].view(self.dtype)
        values = _shaped(flat, rows * freight.views, self.sample_shape)
        return Cargo(values, _beside(slot[beside:], freight, rows)), self._targets(slot, rows)


class CargoRing(Ring):
    """The edge into a stage of one process, with traffic. Other arguments as those of `Ring`."""

    def __init__(
        self,
        depth: int,
        max_rows: int,
        sample_shape: tuple[int, ...],
        device: torch.device,
        *,
        traffic: Traffic,
        **other: Any,
    ) -> None:
        views = max(one.views for one in traffic.values())
        super().__init__(depth, max_rows * views, sample_shape, device, **other)
        self._traffic = traffic
        size = max(_bytes_beside(one, max_rows) for one in traffic.values())
        self._bytes = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(depth)]

    def views(self, item: Item) -> Slot:
        slot, freight = self.slot(item.position), self._traffic.get(item.kind, _NOTHING)
        carried = _beside(self._bytes[slot], freight, item.size)
        return Cargo(self.activations(slot, item.size * freight.views), carried), self.labels[slot][: item.size]


def make_layout(
    rows: int, sample_shape: tuple[int, ...], dtype: torch.dtype, traffic: Traffic, target: TargetForm = CLASS_NUMBER
) -> SlotLayout:
    """With a side channel only where there is traffic."""
    if not traffic:
        return SlotLayout(rows, sample_shape, dtype, target)
    return CargoLayout(rows, sample_shape, dtype, target, traffic)


def write(carried: Mapping[str, Tensor], out: Cargo) -> None:
    """Fills a slot's side channel."""
    for name, place in out.carried.items():
        place.copy_(carried[name])


def _beside(flat: Tensor, freight: Freight, samples: int) -> dict[str, Tensor]:
    """The side channel's tensors as views of bytes."""
    tensors, start = {}, 0
    for name, one in freight.carried.items():
        size, rows = _nbytes(one, freight.views, samples), samples * (1 if one.per_sample else freight.views)
        tensors[name] = _shaped(flat[start : start + size].view(one.dtype), rows, one.shape)
        start += _aligned(size)
    return tensors


def _bytes_beside(freight: Freight, samples: int) -> int:
    return sum(_aligned(_nbytes(one, freight.views, samples)) for one in freight.carried.values())


def _nbytes(one: Carried, views: int, samples: int) -> int:
    return samples * (1 if one.per_sample else views) * prod(one.shape) * one.dtype.itemsize


def _shaped(flat: Tensor, rows: int, shape: tuple[int, ...]) -> Tensor:
    """[rows, *shape], images in channels-last memory, as every engine computes them."""
    if len(shape) == 3:
        channels, height, width = shape
        return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(rows, *shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
