"""A source that is read ahead: a thread assembles the next micro-batches while the stage works.

What a micro-batch holds is decided by its item alone, and items are assembled in the order of the stream, so neither
the look-ahead nor the speed of either side can change a number: they only decide who waits.
"""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from unlocked.rules import CLASS_NUMBER, TargetForm
from unlocked.workers.actions import Item
from unlocked.workers.cargo import Cargo, packed
from unlocked.workers.source import Batch, Source, fill

__all__ = ["Prefetcher"]

_JOIN_SECONDS = 5.0  # that `close` gives a loader to come back from its current batch


@dataclass(slots=True)
class _Slot:
    """A place for one micro-batch on the host."""

    samples: Tensor
    labels: Tensor
    beside: dict[str, Tensor]
    copied: torch.cuda.Event | None = None
    """Recorded when the device has its copy."""

    def views(self, rows: int) -> Batch:
        beside = {name: one.narrow(0, 0, rows) for name, one in self.beside.items()}
        return packed(self.samples.narrow(0, 0, rows), beside), self.labels.narrow(0, 0, rows)


class Prefetcher:
    """Bounded look-ahead over the items of the stream.

    The thread starts with the first `load` and ends with `close`, with the last item, or with an error, which `load`
    raises where the micro-batch was due.

    Args:
        source: assembles an item's micro-batch, on the CPU. Called in the thread, in stream order.
        items: what will be asked for, in that order (those without data are left out).
        depth: micro-batches that lie ready at most, at least 1. One more is in use by the stage.
        rows: of the largest micro-batch.
        sample_shape: one sample's.
        dtype: of the samples.
        target: the form of one sample's target.
        beside: one row [1, ...] of each named tensor.
        device: where micro-batches are wanted; for a GPU they are assembled in page-locked memory.
        timeout: seconds that `load` waits.
    """

    def __init__(
        self,
        source: Source,
        items: Iterable[Item],
        *,
        depth: int,
        rows: int,
        sample_shape: tuple[int, ...],
        device: torch.device,
        timeout: float,
        dtype: torch.dtype = torch.float32,
        target: TargetForm = CLASS_NUMBER,
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._source, self._device, self._timeout = source, device, timeout
        self._items: Iterator[Item] = (item for item in items if item.kind != "snapshot")
        on_gpu = device.type == "cuda"
        layout = torch.channels_last if len(sample_shape) == 3 else torch.contiguous_format
        self._free = deque(
            _Slot(
                torch.empty((rows, *sample_shape), dtype=dtype, memory_format=layout, pin_memory=on_gpu),
                torch.empty(rows, *target.shape, dtype=target.dtype, pin_memory=on_gpu),
                {
                    name: torch.empty(rows, *one.shape[1:], dtype=one.dtype, pin_memory=on_gpu)
                    for name, one in beside.items()
                },
            )
            for _ in range(depth + 1)
        )
        self._ready: deque[tuple[Item, _Slot]] = deque()
        self._in_use: _Slot | None = None
        self._error: BaseException | None = None
        self._closed = False
        # A stage may be kept on cores of its own later: what reads ahead for it stays free to use those that idle.
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        self._changed = threading.Condition()
        # A daemon only for the case that `close` can't end it: a reader that never comes back must not keep the
        # process alive.
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        """The micro-batch of `item`, on the device; in `out` if given, else valid until the next `load`.

        Raises:
            ValueError: it did not come in time.
            Exception: whatever kept it from being assembled.
        """
        slot = self._take(item)
        batch = slot.views(item.size)
        if out is not None:
            batch = fill(batch, out, non_blocking=True)
        elif self._device.type == "cuda":
            batch = _moved(batch, self._device)
        else:
            return batch
        if self._device.type == "cuda":
            slot.copied = torch.cuda.Event()
            slot.copied.record()
        return batch

    def close(self) -> None:
        """Ends the thread, then closes the source. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._source.close()

    def _take(self, item: Item) -> _Slot:
        with self._changed:
            assert not self._closed, "load after close"
            if self._thread.ident is None:
                self._thread.start()
            if self._in_use is not None:
                self._free.append(self._in_use)
                self._in_use = None
                self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._ready or self._error is not None, self._timeout):
                raise ValueError(
                    f"the data of {item.kind} micro-batch {item.index} did not come within {self._timeout:g} s; "
                    "look at what the data loader waits for, or give a longer timeout"
                )
            if not self._ready:
                assert self._error is not None
                raise self._error
            found, slot = self._ready.popleft()
            self._in_use = slot
            assert found == item, f"asked for {item}, next in the stream is {found}"
            return slot

    def _run(self) -> None:
        try:
            if self._cores is not None:
                os.sched_setaffinity(0, self._cores)
            for item in self._items:
                slot = self._next_slot()
                if slot is None:
                    return
                if slot.copied is not None:
                    slot.copied.synchronize()
                    slot.copied = None
                self._source.load(item, slot.views(item.size))
                with self._changed:
                    self._ready.append((item, slot))
                    self._changed.notify_all()
            raise LookupError("the stream has no further micro-batch")
        except BaseException as error:  # also a loader's exit belongs to who waits for its batch
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_slot(self) -> _Slot | None:
        """A free slot; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            return None if self._closed else self._free.popleft()


def _moved(batch: Batch, device: torch.device) -> Batch:
    samples, labels = batch
    if isinstance(samples, Cargo):
        beside = {name: one.to(device, non_blocking=True) for name, one in samples.carried.items()}
        samples = Cargo(samples.activations.to(device, non_blocking=True), beside)
    else:
        samples = samples.to(device, non_blocking=True)
    return samples, labels.to(device, non_blocking=True)
