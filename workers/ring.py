"""Edges inside one process: rings of device buffers, ordered by CUDA events (and by nothing on a CPU)."""

from collections import deque
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from unlocked.rules import CLASS_NUMBER, TargetForm
from unlocked.workers.actions import Item
from unlocked.workers.edges import Slot

__all__ = ["Ring", "RingInEdge", "RingOutEdge"]


class Ring:
    """The edge into a stage: `depth` slots, each with activations and labels of one micro-batch.

    The micro-batch at stream position n lies in slot n mod depth. `ready[slot]` is recorded once the producer has
    written it, `free[slot]` once the consumer is done with it; None means that nobody has to wait.

    Args:
        sample_shape: one sample's activations, (C, H, W), (T, D) or (D,).
        flat_consumer: the next layer flattens its input, so images lie in C, H, W order in memory; else channels last.
        dtype: of the activations; int64 where stage 0 reads tokens.
        target: the form of one sample's target.
    """

    def __init__(
        self,
        depth: int,
        max_rows: int,
        sample_shape: tuple[int, ...],
        device: torch.device,
        *,
        flat_consumer: bool,
        dtype: torch.dtype = torch.float32,
        target: TargetForm = CLASS_NUMBER,
    ) -> None:
        self.depth = depth
        self.sample_shape = sample_shape
        self._channels_last = len(sample_shape) == 3 and not flat_consumer
        size = max_rows * prod(sample_shape)
        # Zeros are valid data, should a slot be read before it is written (a captured graph's trial launch may).
        self._values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(depth)]
        self.labels = [torch.zeros(max_rows, *target.shape, dtype=target.dtype, device=device) for _ in range(depth)]
        self.ready: list[torch.cuda.Event | None] = [None] * depth
        self.free: list[torch.cuda.Event | None] = [None] * depth

    def slot(self, position: int) -> int:
        return position % self.depth

    def views(self, item: Item) -> Slot:
        """(activations [size, *sample_shape], targets [size, ...]) of the item's slot. A partial batch is a prefix."""
        slot, rows = self.slot(item.position), item.size
        return self.activations(slot, rows), self.labels[slot][:rows]

    def activations(self, slot: int, rows: int) -> Tensor:
        """[rows, *sample_shape]"""
        flat = self._values[slot][: rows * prod(self.sample_shape)]
        if self._channels_last:
            channels, height, width = self.sample_shape
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(rows, *self.sample_shape)

    def forget_events(self) -> None:
        """Whatever the events ordered has been waited for as a whole."""
        self.ready = [None] * self.depth
        self.free = [None] * self.depth


class RingInEdge:
    """The consumer's end: on a device the stream waits, never the host.

    Args:
        stream: the consumer's; None on a CPU, where whoever issues the work keeps the order.
    """

    def __init__(self, ring: Ring, stream: torch.cuda.Stream | None) -> None:
        self.ring, self._stream = ring, stream
        self._held: deque[int] = deque()

    def expect(self, items: Iterable[Item]) -> None:
        """Nothing is posted ahead."""

    def receive(self, item: Item) -> Slot:
        slot = self.ring.slot(item.position)
        _wait(self.ring.ready[slot], self._stream)
        self._held.append(slot)
        return self.ring.views(item)

    def release(self) -> None:
        self.ring.free[self._held.popleft()] = _recorded(self._stream)


class RingOutEdge:
    """The producer's end.

    Args:
        stream: the producer's; None on a CPU.
    """

    def __init__(self, ring: Ring, stream: torch.cuda.Stream | None) -> None:
        self.ring, self._stream = ring, stream

    def reserve(self, item: Item) -> Slot:
        _wait(self.ring.free[self.ring.slot(item.position)], self._stream)
        return self.ring.views(item)

    def send(self, item: Item) -> None:
        self.ring.ready[self.ring.slot(item.position)] = _recorded(self._stream)

    def flush(self) -> None:
        """The device's order keeps what has been sent."""


def _wait(event: torch.cuda.Event | None, stream: torch.cuda.Stream | None) -> None:
    if event is not None and stream is not None:
        stream.wait_event(event)


def _recorded(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
    if stream is None:
        return None
    event = torch.cuda.Event()
    event.record(stream)
    return event
