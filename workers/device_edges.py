"""Edges between two processes on one GPU: slots in the device's memory that both have open, ordered by its events.

The receiver owns a ring of `depth` + 1 slots and opens it to the sender, which computes an output straight into the
next one. An event per slot says on the device that it is full, another that it is free again; the streams wait for
them, and nothing is copied. An event that another process is to wait for must have been recorded before, so the hosts
tell each other by edges of their own (`signals`): the receiver's host waits for the sender's to have issued a
micro-batch, never for the device to have done it.

CUDA's calls between processes are behind torch's reductions of `torch.multiprocessing` and `torch.cuda.Event`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from unlocked.workers.actions import Item
from unlocked.workers.edges import InEdge, OutEdge, Slot, SlotLayout
from unlocked.workers.lead import HostLead

__all__ = ["SIGNAL", "DeviceInEdge", "DeviceOutEdge"]

SIGNAL = SlotLayout(1, (1,))
"""What travels between the hosts for a micro-batch."""


class DeviceInEdge:
    """The receiving end. Between construction and use: `take` what the sender's `offer` says.

    Args:
        signals: from the sender's host, with `depth` slots of `SIGNAL`.
        depth: micro-batches that the sender may be ahead.
        timeout: seconds to wait for the sender.
        neighbour: the sender, for errors.
    """

    def __init__(
        self, layout: SlotLayout, signals: InEdge, *, depth: int, device: torch.device, timeout: float, neighbour: str
    ) -> None:
        self._layout, self._signals, self._device = layout, signals, device
        self._lead = HostLead(device, timeout, neighbour)
        self._slots = [layout.allocate(device) for _ in range(depth + 1)]
        self._ready: list[torch.cuda.Event] = []
        self._free = [torch.cuda.Event(interprocess=True) for _ in self._slots]
        self._received = self._released = 0

    @property
    def fill(self) -> float:
        """Of the ring, as the hosts know it; 0 to 1."""
        return float(getattr(self._signals, "fill", 0.0))

    def offer(self) -> dict[str, Any]:
        """What the sender needs; JSON."""
        return {
            "slots": [_handle(slot) for slot in self._slots],
            "free": [event.ipc_handle().hex() for event in self._free],
        }

    def take(self, offer: Mapping[str, Any]) -> None:
        self._ready = _open_events(self._device, offer["ready"])

    def expect(self, items: Iterable[Item]) -> None:
        self._signals.expect(map(_signal, items))

    def receive(self, item: Item) -> Slot:
        self._signals.receive(_signal(item))
        slot = self._received % len(self._slots)
        self._received += 1
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])
        return self._layout.views(self._slots[slot], item.size, item.kind)

    def release(self) -> None:
        self._free[self._released % len(self._slots)].record(torch.cuda.current_stream(self._device))
        self._released += 1
        self._signals.release()  # last: the sender waits for what has been recorded when it hears this
        self._lead.count()


class DeviceOutEdge:
    """The sending end.

    Args:
        signals: to the receiver's host.
        offer: the receiver's.

    Raises:
        RuntimeError: the receiver's memory or events can't be opened.
    """

    def __init__(
        self,
        layout: SlotLayout,
        signals: OutEdge,
        offer: Mapping[str, Any],
        *,
        device: torch.device,
        timeout: float,
        neighbour: str,
    ) -> None:
        self._layout, self._signals, self._device = layout, signals, device
        self._lead = HostLead(device, timeout, neighbour)
        self._slots = [_open_memory(device, handle) for handle in offer["slots"]]
        self._free = _open_events(device, offer["free"])
        self._ready = [torch.cuda.Event(interprocess=True) for _ in self._slots]
        self._sent = 0

    def offer(self) -> dict[str, Any]:
        """What the receiver takes; JSON."""
        return {"ready": [event.ipc_handle().hex() for event in self._ready]}

    def reserve(self, item: Item) -> Slot:
        self._signals.reserve(_signal(item))
        slot = self._sent % len(self._slots)
        if self._sent >= len(self._slots):
            # The signal for the micro-batch before this one left only when the receiver had released this slot.
            torch.cuda.current_stream(self._device).wait_event(self._free[slot])
        return self._layout.views(self._slots[slot], item.size, item.kind)

    def send(self, item: Item) -> None:
        self._ready[self._sent % len(self._slots)].record(torch.cuda.current_stream(self._device))
        self._sent += 1
        self._signals.send(_signal(item))  # after the record, which the receiver's stream waits for
        self._lead.count()

    def flush(self) -> None:
        self._signals.flush()
        self._lead.wait()


def _signal(item: Item) -> Item:
    return replace(item, size=1)


def _handle(memory: Tensor) -> list[Any]:
    """What another process opens the tensor's memory by: what torch's reduction says, bytes in hexadecimal digits."""
    _, arguments = reductions.reduce_tensor(memory)
    *_, handle, size, offset, _, counter, counter_offset, event, synchronises = arguments
    return [memory.numel(), handle.hex(), size, offset, counter.hex(), counter_offset, event.hex(), synchronises]


def _open_memory(device: torch.device, handle: list[Any]) -> Tensor:
    count, memory, size, offset, counter, counter_offset, event, synchronises = handle
    return reductions.rebuild_cuda_tensor(
        Tensor,
        torch.Size([count]),
        (1,),
        0,
        torch.TypedStorage,
        torch.uint8,
        device.index,  # by this process's numbers
        bytes.fromhex(memory),
        size,
        offset,
        False,
        bytes.fromhex(counter),
        counter_offset,
        bytes.fromhex(event),
        synchronises,
    )


def _open_events(device: torch.device, handles: Iterable[str]) -> list[torch.cuda.Event]:
    return [torch.cuda.Event.from_ipc_handle(device, bytes.fromhex(handle)) for handle in handles]
