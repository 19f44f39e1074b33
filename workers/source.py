"""Stage 0's input: micro-batches out of datasets that stay on the device as uint8, or that are read ahead on the host.

Which images a micro-batch holds and how they are augmented depends on (seed, epoch, sample) alone.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from unlocked.data import ImageDataset, class_order, epoch_order
from unlocked.kernels.philox import Purpose, keyed_uniform
from unlocked.workers.actions import Item
from unlocked.workers.cargo import Cargo, packed

__all__ = ["Batch", "BatchSource", "LoadBatch", "Source", "SplitSource", "fill"]

Batch = tuple[Any, Tensor]
"""Samples [size, *sample_shape] float32 (images in channels-last memory; tokens int64), a `workers.cargo.Cargo` where
named tensors go beside them; and targets [size, ...], of class numbers int64 [size]."""
LoadBatch = Callable[..., Batch]


class Source(Protocol):
    """What stage 0 reads: a `BatchSource`, whose input operation a graph can hold, or a reader on the host."""

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        """The micro-batch of a train, statistics or evaluate item, on the stage's device; in `out` if given."""

    def close(self) -> None:
        """Lets go of threads and files. Idempotent."""


class BatchSource:
    """Assembles the micro-batch of any item of the stream.

    Args:
        train: the training set, on the device already.
        test: what evaluation items read, or None.
        load_batch: the backend's input operation.
        batch_size, eval_batch_size: rows of a full micro-batch of either kind.
    """

    def __init__(
        self,
        train: ImageDataset,
        test: ImageDataset | None,
        *,
        seed: int,
        batch_size: int,
        eval_batch_size: int,
        load_batch: LoadBatch,
    ) -> None:
        self.train, self.test = train, test
        self.seed, self.batch_size, self.eval_batch_size = seed, batch_size, eval_batch_size
        self._load = load_batch
        self.device = train.images.device
        self._options: dict[str, dict[str, Any]] = {"train": train.batch_options()}
        if test is not None:
            self._options["evaluate"] = test.batch_options()
        self._orders: dict[str, tuple[int, Tensor]] = {}
        # Read by the kernel on the device, so that a captured graph can be told where it stands.
        self.epoch = torch.zeros((), dtype=torch.int64, device=self.device)
        self.reserve(1)

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        """The micro-batch of a train, statistics or evaluate item."""
        self.seek(item)
        return self.load_at_cursor(item, out)

    def load_at_cursor(self, item: Item, out: Batch | None = None, ahead: int = 0) -> Batch:
        """The same from wherever the device's cursor points: of `item` only kind and size are read, so a graph that
        was captured with one item serves all others like it.

        Args:
            ahead: micro-batches after the one that `seek` was told.
        """
        kind = "evaluate" if item.kind == "evaluate" else "train"
        order, size, start = self._orders[item.kind][1], item.size, self._starts[ahead, 0]
        data = self.test if kind == "evaluate" else self.train
        assert data is not None
        if data.images.dtype != torch.uint8 or data.beside or data.num_classes == 0:
            return self._gather(data, order, start, size, out)
        return self._load(
            data.images,
            data.labels,
            order,
            start,
            size,
            seed=self.seed,
            epoch=self.epoch,
            out=out,
            **self._options[kind],
        )

    def _gather(self, data: ImageDataset, order: Tensor, start: Tensor, size: int, out: Batch | None) -> Batch:
        """Samples that are floats already, or tokens, are taken as they are; floats may be mirrored. Pixels of images
        whose targets are no class numbers are normalised and no more."""
        index = order[start + torch.arange(size, device=self.device)]
        labels = data.labels[index].to(data.target_dtype)
        if data.images.dtype == torch.uint8:
            samples = data.images[index].float().sub_(data.mean255[:, None, None]).mul_(data.inv_std255[:, None, None])
        else:
            samples = data.images[index].to(data.sample_dtype)
        if data.augmentation.flip:  # the same draw as load_batch's
            mirrored = keyed_uniform(self.seed, Purpose.AUGMENT, index, self.epoch)[:, 0] < 0.5
            samples = torch.where(mirrored[:, None, None, None], samples.flip(-1), samples)
        if samples.dim() == 4:
            samples = samples.contiguous(memory_format=torch.channels_last)
        batch = packed(samples, {name: value[index] for name, value in data.beside.items()}), labels
        return batch if out is None else fill(batch, out)

    def seek(self, item: Item, count: int = 1) -> None:
        """Points the device's cursor at `item` and the `count` - 1 full micro-batches after it."""
        self._make_order(item)
        rows = self.eval_batch_size if item.kind == "evaluate" else self.batch_size
        if count == 1:
            self._starts[0, 0].fill_(item.index * rows)
        else:
            torch.add(self._numbers[:count] * rows, item.index * rows, out=self._starts[:count])
        self.epoch.fill_(item.epoch)

    def reserve(self, count: int) -> None:
        """Makes room for a cursor over `count` micro-batches. It moves, so call this before any graph is captured."""
        # 16 bytes apart, so that no kernel is compiled for two alignments.
        self._numbers = torch.arange(count, device=self.device)[:, None].repeat(1, 2)
        self._starts = torch.zeros_like(self._numbers)

    def _make_order(self, item: Item) -> None:
        """The permutation that `item` reads. It lies at a fixed address and is rewritten when the epoch changes."""
        kept = self._orders.get(item.kind)
        if kept is not None and (kept[0] == item.epoch or item.kind == "evaluate"):
            return
        if item.kind == "evaluate":
            assert self.test is not None
            order = torch.arange(len(self.test), device=self.device)
        else:
            purpose = Purpose.STATISTICS if item.kind == "statistics" else Purpose.SHUFFLE
            order = self._order_of_epoch(item.epoch, purpose)
            if kept is not None:
                order = kept[1].copy_(order)
        self._orders[item.kind] = (item.epoch, order)

    def _order_of_epoch(self, epoch: int, purpose: Purpose) -> Tensor:
        train = self.train
        if train.classes_per_batch is None:
            return epoch_order(len(train), self.seed, epoch, self.device, purpose)
        return class_order(train.labels, train.classes_per_batch, self.batch_size, self.seed, epoch, purpose)

    def close(self) -> None:
        """Nothing is open."""


def fill(batch: Batch, out: Batch, *, non_blocking: bool = False) -> Batch:
    """Copies a micro-batch into `out`, which is returned."""
    samples, place = batch[0], out[0]
    if isinstance(place, Cargo):
        place.activations.copy_(samples.activations, non_blocking=non_blocking)
        for name, one in place.carried.items():
            one.copy_(samples.carried[name], non_blocking=non_blocking)
    else:
        # What no layer reads is not handed on.
        place.copy_(samples.activations if isinstance(samples, Cargo) else samples, non_blocking=non_blocking)
    out[1].copy_(batch[1], non_blocking=non_blocking)
    return out


class SplitSource:
    """Training and statistics items from one source, evaluation items from another."""

    def __init__(self, train: Source, test: Source | None) -> None:
        self._train, self._test = train, test

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        source = self._test if item.kind == "evaluate" else self._train
        assert source is not None
        return source.load(item, out)

    def close(self) -> None:
        self._train.close()
        if self._test is not None:
            self._test.close()
