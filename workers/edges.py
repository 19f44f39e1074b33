"""Edges: bounded, one-directional queues between two stages, made of fixed-size slots.

A slot holds one micro-batch whole: targets first, then activations, in one buffer and one message, so that a partial
micro-batch is a prefix of it. Both ends know every micro-batch's size from the stream's plan; nothing but numbers
travels. The receiving end owns `queue_depth` slots with receives posted ahead, the sending end owns one.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.rules import CLASS_NUMBER, TargetForm
from unlocked.workers.actions import Item, ItemKind
from unlocked.workers.errors import LinkLostError
from unlocked.workers.lead import HostLead

__all__ = ["InEdge", "OutEdge", "ProcessInEdge", "ProcessOutEdge", "Slot", "SlotLayout", "make_edges"]

Slot = tuple[Any, Tensor]
"""What passes (activations [B, ...], or a `workers.cargo.Cargo` where more is sent) and the targets [B, ...]: of a
classification the labels [B]."""

_ALIGNMENT = 64  # bytes: activations begin on a cache line, as torch's own allocations do


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """How a micro-batch lies in a slot's bytes.

    `sample_shape` is one sample's activations, (C, H, W), (T, D) or (D,); four-dimensional batches travel in
    channels-last memory, as every engine computes them.
    """

    max_rows: int
    sample_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    target: TargetForm = CLASS_NUMBER

    @property
    def capacity(self) -> int:
        """Bytes of a slot."""
        return self.nbytes(self.max_rows)

    def nbytes(self, rows: int, kind: ItemKind = "train") -> int:
        """Bytes of a micro-batch of `rows` samples: the length of its message."""
        return self._targets_bytes(rows) + rows * prod(self.sample_shape) * self.dtype.itemsize

    def allocate(self, device: torch.device) -> Tensor:
        return torch.empty(self.capacity, dtype=torch.uint8, device=device)

    def message(self, slot: Tensor, rows: int, kind: ItemKind = "train") -> Tensor:
        """The bytes that travel."""
        return slot[: self.nbytes(rows, kind)]

    def views(self, slot: Tensor, rows: int, kind: ItemKind = "train") -> Slot:
        """(activations [rows, *sample_shape], targets [rows, ...]) as views of the slot."""
        targets = self._targets(slot, rows)
        flat = slot[self._targets_bytes(rows) : self.nbytes(rows)].view(self.dtype)
        if len(self.sample_shape) == 3:
            channels, height, width = self.sample_shape
            return flat.view(rows, height, width, channels).permute(0, 3, 1, 2), targets
        return flat.view(rows, *self.sample_shape), targets

    def _targets(self, slot: Tensor, rows: int) -> Tensor:
        shape, dtype = self.target
        return slot[: rows * prod(shape) * dtype.itemsize].view(dtype).view(rows, *shape)

    def _targets_bytes(self, rows: int) -> int:
        shape, dtype = self.target
        return -(-rows * prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class InEdge(Protocol):
    """Where a stage takes micro-batches from."""

    def expect(self, items: Iterable[Item]) -> None:
        """Tells which micro-batches will come, in order, so that receives can be posted ahead."""
        ...

    def receive(self, item: Item) -> Slot:
        """Waits for `item`; (activations, labels), valid until `release`."""
        ...

    def release(self) -> None:
        """Gives the slot of the oldest received micro-batch back."""
        ...


class OutEdge(Protocol):
    """Where a stage puts its outputs."""

    def reserve(self, item: Item) -> Slot:
        """(activations, labels) of the slot from which `item` will be sent, for the stage to write. The host doesn't
        wait here: room for one micro-batch more than the neighbour may have is always there."""
        ...

    def send(self, item: Item) -> None:
        """Lets the reserved slot go, once the neighbour has room for it, without waiting for its arrival."""
        ...

    def flush(self) -> None:
        """Waits until everything has left."""
        ...


def make_edges(
    incoming: SlotLayout | None,
    outgoing: SlotLayout | None,
    *,
    rank: int,
    depth: int,
    device: torch.device,
    timeout: float,
) -> "tuple[InEdge | None, OutEdge | None]":
    """The edges of stage `rank` to its neighbours, connected; None at the ends of the pipeline. Every rank calls this.

    Args:
        incoming, outgoing: what travels on the edge from rank - 1 and on the one to rank + 1.
        depth: slots of the receiving end.
        timeout: seconds to wait for a neighbour.
    """
    _connect(rank, incoming is not None, outgoing is not None, device, timeout)
    inbox = outbox = None
    if incoming is not None:
        inbox = ProcessInEdge(incoming, source_rank=rank - 1, depth=depth, device=device, timeout=timeout)
    if outgoing is not None:
        outbox = ProcessOutEdge(outgoing, target_rank=rank + 1, device=device, timeout=timeout)
    return inbox, outbox


class ProcessInEdge:
    """The receiving end between two ranks of a torch.distributed process group (Gloo or NCCL)."""

    def __init__(
        self, layout: SlotLayout, *, source_rank: int, depth: int, device: torch.device, timeout: float
    ) -> None:
        self._layout, self._rank, self._device, self._timeout = layout, source_rank, device, timedelta(seconds=timeout)
        self._lead = HostLead(device, timeout, f"stage {source_rank}")
        self._free = deque(layout.allocate(device) for _ in range(depth))
        self._expected: deque[Item] = deque()
        self._posted: deque[tuple[Item, Tensor, dist.Work]] = deque()
        self._held: deque[Tensor] = deque()

    def expect(self, items: Iterable[Item]) -> None:
        self._expected.extend(items)
        self._post()

    def receive(self, item: Item) -> Slot:
        expected, slot, work = self._posted.popleft()
        assert expected == item, f"expected {expected}, asked for {item}"
        _wait(work, self._device, self._timeout, f"stage {self._rank}")
        self._held.append(slot)
        return self._layout.views(slot, item.size, item.kind)

    def release(self) -> None:
        self._free.append(self._held.popleft())
        self._post()
        self._lead.count()

    def _post(self) -> None:
        while self._free and self._expected:
            item, slot = self._expected.popleft(), self._free.popleft()
            with _link(f"stage {self._rank}"):
                work = dist.irecv(self._layout.message(slot, item.size, item.kind), src=self._rank)
            assert work is not None
            self._posted.append((item, slot, work))


class ProcessOutEdge:
    """The sending end between two ranks."""

    def __init__(self, layout: SlotLayout, *, target_rank: int, device: torch.device, timeout: float) -> None:
        self._layout, self._rank, self._device, self._timeout = layout, target_rank, device, timedelta(seconds=timeout)
        self._lead = HostLead(device, timeout, f"stage {target_rank}")
        self._slot, self._leaving = layout.allocate(device), layout.allocate(device)
        self._work: dist.Work | None = None

    def reserve(self, item: Item) -> Slot:
        return self._layout.views(self._slot, item.size, item.kind)

    def send(self, item: Item) -> None:
        self._wait_for_last()
        self._slot, self._leaving = self._leaving, self._slot
        with _link(f"stage {self._rank}"):
            self._work = dist.isend(self._layout.message(self._leaving, item.size, item.kind), dst=self._rank)
        self._lead.count()

    def flush(self) -> None:
        self._wait_for_last()
        self._lead.wait()

    def _wait_for_last(self) -> None:
        if self._work is not None:
            _wait(self._work, self._device, self._timeout, f"stage {self._rank}")
            self._work = None


def _connect(rank: int, has_source: bool, has_target: bool, device: torch.device, timeout: float) -> None:
    """Sends one byte over each edge: NCCL makes a pair's communicator, which takes seconds, with its first message.

    Even ranks send first, odd ones receive first, so that all pairs connect in two rounds and nobody waits in a circle.
    """

    def receive() -> None:
        with _link(f"stage {rank - 1}"):
            work = dist.irecv(torch.empty(1, dtype=torch.uint8, device=device), src=rank - 1)
        assert work is not None
        _wait(work, device, timedelta(seconds=timeout), f"stage {rank - 1}")

    def send() -> None:
        with _link(f"stage {rank + 1}"):
            work = dist.isend(torch.zeros(1, dtype=torch.uint8, device=device), dst=rank + 1)
        assert work is not None
        _wait(work, device, timedelta(seconds=timeout), f"stage {rank + 1}")

    for step, wanted in [(receive, has_source), (send, has_target)][:: 1 if rank % 2 else -1]:
        if wanted:
            step()
    HostLead(device, timeout, "the neighbours").wait()


class _link:
    """Turns the backend's errors into one that names the neighbour."""

    def __init__(self, neighbour: str) -> None:
        self._neighbour = neighbour

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise LinkLostError(f"the link to {self._neighbour} broke ({first_line(error)})") from error


def _wait(work: dist.Work, device: torch.device, timeout: timedelta, neighbour: str) -> None:
    """On a GPU the current stream waits, and the host goes on: how far, `HostLead` says."""
    with _link(neighbour):
        if device.type == "cuda":
            work.wait()
        else:
            work.wait(timeout)
