"""Reads a loader's batches as the items of the stream ask for them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import torch

from unlocked.data import LoaderDataset
from unlocked.models.generators import DRAWING, SOURCES, GlobalGenerators
from unlocked.workers.actions import Item, ItemKind
from unlocked.workers.cargo import packed
from unlocked.workers.source import Batch, fill

__all__ = ["LoaderReader", "skip"]

_END = object()


class LoaderReader:
    """Items of one dataset, in stream order: every (kind, epoch) is an iteration over the loader."""

    def __init__(self, data: LoaderDataset) -> None:
        self._data = data
        self._batches: Iterator[Any] | None = None
        self._steps = -(-data.num_samples // data.batch_size)
        # Also what is to be dropped; None: not known. A loader's own workers draw from generators of theirs.
        self._must_read = not data.is_keyed or (False if getattr(data.loader, "num_workers", 0) else None)

    def skip(self, items: list[Item]) -> None:
        """Drops the first items of one iteration: all of them, or as far as a run had come.

        A whole iteration over a loader whose epochs depend on their number alone is not read. What it would have drawn
        from the process's generators is drawn in any case: who else draws from them goes on as if it had been read.
        """
        first = items[0]
        if items[-1].last and not self._must_read:
            if self._must_read is not None:
                self._guarded(first, lambda: self._data.pass_over(first.epoch))
                return
            self._begin(first)
            generators = GlobalGenerators(SOURCES, torch.device("cpu"))
            before = generators.states()
            self._take(first)
            # A sample that is made by chance in this process leaves the generators elsewhere, so all are to be made.
            self._must_read = bool(generators.moved(before))
            if not self._must_read:
                self._batches = None
                return
            items = items[1:]
        for item in items:
            self._next(item)

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        """Samples [size, ...] float32 (images in channels-last memory; tokens int64), with named tensors a `Cargo`, and
        targets [size, ...], of class numbers int64 [size].

        Raises:
            ValueError: the loader ended early or late, or its batch does not fit; says which.
            RuntimeError: the loader failed.
        """
        data = self._data
        samples, beside, targets = data.check(self._next(item), item.size, self._where(item))
        assert targets is not None
        if out is None:
            layout = torch.channels_last if samples.dim() == 4 else torch.contiguous_format
            places = {name: torch.empty(one.shape, dtype=data.beside[name].dtype) for name, one in beside.items()}
            out = (
                packed(torch.empty(samples.shape, dtype=data.sample_dtype, memory_format=layout), places),
                torch.empty(targets.shape, dtype=data.target_dtype),
            )
        samples = data.read_pixels(samples) if samples.dtype == torch.uint8 else samples
        return fill((packed(samples, beside), targets), out)

    def close(self) -> None:
        """Ends the iteration in progress, and with it the loader's workers."""
        self._batches = None

    def _next(self, item: Item) -> Any:
        if item.index == 0 or self._batches is None:
            self._begin(item)
        return self._take(item)

    def _begin(self, item: Item) -> None:
        self._batches = None  # the iteration before ends first: its workers make room
        self._batches = self._guarded(item, lambda: self._data.batches(item.epoch))

    def _take(self, item: Item) -> Any:
        batch = self._pull(item)
        if batch is _END:
            raise ValueError(
                f"{self._where(item)}: the loader ended, {self._steps} batches are due in an epoch; give "
                "steps_per_epoch, or a loader that can be iterated again"
            )
        if item.last:
            self._finish(item)
        return batch

    def _pull(self, item: Item) -> Any:
        batches = self._batches
        assert batches is not None
        return self._guarded(item, lambda: next(batches, _END))

    def _guarded(self, item: Item, call: Callable[[], Any]) -> Any:
        try:
            with DRAWING:  # what a loader draws in a thread must not come from a layer's keyed generator
                return call()
        except Exception as error:
            raise RuntimeError(f"{self._where(item)}: the loader failed: {type(error).__name__}: {error}") from error

    def _finish(self, item: Item) -> None:
        """The iteration is over. A loader that is read to its end must be at its end."""
        whole = item.kind != "statistics" and item.index + 1 == self._steps and not self._data.is_cut
        if whole and self._pull(item) is not _END:
            raise ValueError(f"{self._where(item)}: the loader has length {self._steps}, but yields more batches")
        self._batches = None

    def _where(self, item: Item) -> str:
        return f"{item.kind} micro-batch {item.index} of epoch {item.epoch} ({self._data.name})"


def skip(readers: Mapping[ItemKind, LoaderReader], items: Iterable[Item]) -> None:
    """Drops what a run has done already, in the order of the stream: loaders that draw from one generator find it where
    an undisturbed run has it.

    Args:
        readers: who reads the items of a kind; there may be none.
        items: of the run, from its first position on.

    Raises:
        ValueError: a loader ended early or late.
        RuntimeError: a loader failed.
    """
    for (kind, _), iteration in groupby(items, key=lambda item: (item.kind, item.epoch)):
        if kind in readers:
            readers[kind].skip(list(iteration))
