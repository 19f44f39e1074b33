"""What a run reads: data of any kind as a dataset, and which source stage 0 gets for it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unlocked.data import Dataset, ImageDataset, LoaderDataset
from unlocked.kernels.images import load_batch as host_load_batch
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import ItemKind
from unlocked.workers.prefetch import Prefetcher
from unlocked.workers.reader import LoaderReader
from unlocked.workers.source import BatchSource, LoadBatch, Source, SplitSource

__all__ = ["Data", "as_dataset", "make_source", "probe_sample", "rows_per_batch", "with_classes"]

Data = Dataset | tuple[Tensor, Tensor] | Iterable[Any]
"""A dataset; or (samples, labels) as two tensors; or an iterable of batches, such as a PyTorch DataLoader."""

_READ_AHEAD = 2  # micro-batches, for streamed data unless the settings say otherwise
_DEVICE_SHARE = 0.5  # of a GPU's free memory that resident data may take: the rest is for layers and edges


def as_dataset(
    data: Data, split: str, *, num_classes: int | None = None, steps_per_epoch: int | None = None
) -> Dataset:
    """What `Trainer.fit` was given, with its sizes.

    Args:
        num_classes: None: for tensors, as many as the labels show; for a loader, as many as the model tells apart.
        steps_per_epoch: batches of a loader that make an epoch.

    Raises:
        ValueError: data that can't be read.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        samples, labels = data
        if labels.numel() == 0:
            raise ValueError(f"the {split} data is empty: labels {list(labels.shape)}")
        # Labels of any other type are refused by the dataset; of them there may be no largest integer.
        largest = int(labels.max()) if labels.dtype == torch.int64 else 0
        data = ImageDataset.from_tensors(samples, labels, num_classes or largest + 1, split=split)
    elif not isinstance(data, ImageDataset | LoaderDataset):
        if not isinstance(data, Iterable):
            raise ValueError(
                f"the {split} data is a {type(data).__name__}; give a dataset, two tensors (samples, labels), or a "
                "DataLoader or another iterable of batches"
            )
        return LoaderDataset.wrap(data, num_classes=num_classes, steps_per_epoch=steps_per_epoch, split=split)
    if steps_per_epoch is not None:
        raise ValueError("steps_per_epoch is for loaders; an epoch of a dataset is all of it (max_steps stops earlier)")
    return data


def rows_per_batch(data: Dataset, given: int | None, default: int | None = None) -> int:
    """The batch size that was given, or the loader's own.

    Raises:
        ValueError: none, or two that differ.
    """
    if isinstance(data, LoaderDataset):
        if given not in (None, data.batch_size):
            raise ValueError(f"batch size {given} was given, but the {data.split} loader yields {data.batch_size} rows")
        return data.batch_size
    size = default if given is None else given
    if size is None:
        raise ValueError("give batch_size, the rows of a micro-batch")
    return size


def with_classes(data: Dataset, num_classes: int) -> Dataset:
    """A loader that did not know its classes learns them from the model.

    Raises:
        ValueError: the data has more classes than the model tells apart.
    """
    if isinstance(data, LoaderDataset) and data.num_classes is None:
        return replace(data, num_classes=num_classes)
    if data.num_classes is not None and data.num_classes > num_classes:
        raise ValueError(f"the {data.split} data has {data.num_classes} classes, the model tells {num_classes} apart")
    return data


def probe_sample(data: Dataset) -> Tensor:
    """One sample's input to follow a network's shapes with: zeros, or the smallest and the largest of known tokens."""
    sample = torch.zeros(data.image_shape, dtype=data.sample_dtype)
    if isinstance(data, ImageDataset) and data.sample_dtype == torch.int64:
        smallest, largest = torch.aminmax(data.images)
        sample += smallest.cpu()
        sample.view(-1)[0] = largest
    return sample


def make_source(
    train: Dataset,
    test: Dataset | None,
    *,
    plan: StreamPlan,
    start: int,
    seed: int,
    device: torch.device,
    load_batch: LoadBatch,
    prefetch: int | None,
    timeout: float,
) -> Source:
    """The source of stage 0. Every choice gives the same bits: the input operation rounds alike on every device.

    Args:
        start: the first stream position that is asked for.
        load_batch: the input operation on `device`.
        prefetch: micro-batches to assemble ahead on the host; 0: none, each when stage 0 asks for it. None: a few
            where the data is streamed, none where it is resident.
        timeout: seconds that stage 0 waits for a micro-batch.
    """
    sets = [data for data in (train, test) if data is not None]
    resident = not any(_is_streamed(data, device) for data in sets)
    home = device if resident else torch.device("cpu")
    if any(isinstance(data, ImageDataset) and data.margin for data in sets):
        load_batch = host_load_batch  # plain tensor operations, which run on any device

    def images(train: ImageDataset, test: ImageDataset | None) -> BatchSource:
        return BatchSource(
            train.to(home),
            None if test is None else test.to(home),
            seed=seed,
            batch_size=plan.batch_size,
            eval_batch_size=plan.eval_batch_size,
            load_batch=load_batch if resident else host_load_batch,
        )

    def reader(data: Dataset, *kinds: ItemKind) -> Source:
        if isinstance(data, ImageDataset):
            return images(data, data)
        one = LoaderReader(data)
        one.skip(item for item in plan.items(0, start) if item.kind in kinds)
        return one

    source: Source
    if isinstance(train, ImageDataset) and not isinstance(test, LoaderDataset):
        source = images(train, test)
    else:
        source = SplitSource(reader(train, "train", "statistics"), None if test is None else reader(test, "evaluate"))
    depth = prefetch if prefetch is not None else 0 if resident else _READ_AHEAD
    if home == device and (depth == 0 or device.type == "cuda"):
        return source  # a GPU assembles resident micro-batches itself, faster than a host could send them
    return Prefetcher(
        source,
        plan.items(start),
        depth=max(depth, 1),
        rows=plan.max_rows,
        sample_shape=train.image_shape,
        dtype=train.sample_dtype,
        device=device,
        timeout=timeout,
    )


def _is_streamed(data: Dataset, device: torch.device) -> bool:
    """The dataset's own choice; else whether it is too large for the device."""
    if isinstance(data, LoaderDataset):
        return True
    if data.streamed is not None:
        return data.streamed
    if device.type != "cuda" or data.images.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return data.images.nbytes > _DEVICE_SHARE * free
