"""What a run reads: data of any kind as a dataset, and which source stage 0 gets for it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unlocked.data import Dataset, ImageDataset, LoaderDataset
from unlocked.data.batches import Parts, readable_type
from unlocked.data.conversion import convert
from unlocked.kernels.images import load_batch as host_load_batch
from unlocked.rules import CLASS_NUMBER, TargetForm, Task
from unlocked.rules.task_kinds import CLASSIFICATION
from unlocked.runtime.learned import known_classes, with_task
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import ItemKind
from unlocked.workers.prefetch import Prefetcher
from unlocked.workers.reader import LoaderReader, skip
from unlocked.workers.source import BatchSource, LoadBatch, Source, SplitSource

__all__ = [
    "Data",
    "as_dataset",
    "beside_of",
    "check_drop_last",
    "make_source",
    "probe_sample",
    "rows_per_batch",
    "with_classes",
]

Data = Dataset | tuple[Tensor, Tensor] | Mapping[str, Any] | Iterable[Any]
"""A dataset; or (samples, targets) as two tensors, or named tensors [N, ...]; or an iterable of batches, such as a
PyTorch DataLoader."""

_READ_AHEAD = 2  # micro-batches, for streamed data unless the settings say otherwise
_DEVICE_SHARE = 0.5  # of a GPU's free memory that resident data may take: the rest is for layers and edges


def as_dataset(
    data: Data,
    split: str,
    *,
    like: Dataset | None = None,
    steps_per_epoch: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    task: Task | None = None,
) -> Dataset:
    """What `Trainer.fit` was given, with its sizes.

    Args:
        like: of evaluation data, the training data: what kind of targets there are, and how many classes. None: as the
            targets tell, and as many classes as the model tells apart, of tensors at least those that the labels show.
        steps_per_epoch: batches of a loader that make an epoch.
        batch_size: rows of a micro-batch of an indexable PyTorch Dataset.
        seed: keys the order in which such a Dataset is read; None: one after the other.
        task: what is to be learned; None: as the targets tell.

    Raises:
        ValueError: data that can't be read.
    """
    rows = "batch_size" if split == "train" else "eval_batch_size"
    for name, count in ((rows, batch_size), ("steps_per_epoch", steps_per_epoch)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, Integral) or count < 1):
            raise ValueError(f"{name} is {count!r}; it must be a whole number of at least 1")
    numbers = like is not None and TargetForm(like.target_shape, like.target_dtype) != CLASS_NUMBER
    if numbers or (task is not None and task.name != "classification"):
        data = _named_pair(data)
    num_classes = None if like is None else known_classes(like)
    given = data
    data = convert(given, split, batch_size=batch_size, seed=seed)
    if isinstance(data, Parts):
        data = _of_parts(data, split)
    elif isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        samples, labels = data
        shown = num_classes or int(labels.max()) + 1
        data = ImageDataset(
            name="custom", split=split, images=samples, labels=labels, num_classes=shown, open_classes=not num_classes
        )
    elif not isinstance(data, ImageDataset | LoaderDataset):
        if not isinstance(data, Iterable):
            raise ValueError(
                f"the {split} data is a {type(data).__name__}; give a dataset, two tensors (samples, labels), or a "
                "DataLoader or another iterable of batches"
            )
        one = LoaderDataset.wrap(data, num_classes=num_classes, steps_per_epoch=steps_per_epoch, split=split)
        return one if data is given else replace(one, is_ours=True)
    if isinstance(data, ImageDataset):
        _refuse_non_finite(data)
    if steps_per_epoch is not None:
        raise ValueError("steps_per_epoch is for loaders; an epoch of a dataset is all of it (max_steps stops earlier)")
    return data


def _named_pair(data: Any) -> Any:
    """Two whole tensors, of which the second holds no class numbers, as named ones."""
    pair = data.tensors if type(data) is TensorDataset else data
    whole = isinstance(pair, tuple) and len(pair) == 2 and all(hasattr(part, "ndim") for part in pair)
    return ({"samples": pair[0]}, pair[1]) if whole else data


def _of_parts(parts: Parts, split: str) -> ImageDataset:
    samples, beside, targets = parts
    if targets is None:
        targets = torch.zeros(len(samples), 0, dtype=torch.uint8)
    else:
        targets = targets.to(readable_type(targets, as_target=True))
    return ImageDataset(name="custom", split=split, images=samples, labels=targets, num_classes=0, beside=dict(beside))


def _refuse_non_finite(data: ImageDataset) -> None:
    """One pass over samples in memory; what is streamed or comes from a loader is seen by the loss that it spoils."""
    samples = data.images
    if not samples.is_floating_point() or data.streamed or bool(samples.sum().isfinite()):
        return
    for start in range(0, len(samples), 1024):  # or the sum alone was too large
        bad = samples[start : start + 1024].isfinite().logical_not().nonzero()
        if len(bad):
            row, *place = (int(number) for number in bad[0])
            value = float(samples[(start + row, *place)])
            raise ValueError(
                f"the {data.split} data holds {value} in sample {start + row}, at {', '.join(map(str, place))}; leave "
                "the sample out, or mend it (torch.nan_to_num)"
            )


def rows_per_batch(data: Dataset, given: int | None, default: int | None = None) -> int:
    """The batch size that was given, or the loader's own.

    Raises:
        ValueError: none, or two that differ.
    """
    if isinstance(data, LoaderDataset):
        if given not in (None, data.batch_size) and not data.is_ours:
            raise ValueError(f"batch size {given} was given, but the {data.split} loader yields {data.batch_size} rows")
        return data.batch_size if given is None else given
    size = default if given is None else given
    if size is None:
        raise ValueError("give batch_size, the rows of a micro-batch")
    return size


def check_drop_last(data: Dataset, plan: StreamPlan) -> None:
    """What a loader yields is what is trained on, so it is the loader that leaves something out.

    Raises:
        ValueError: a loader with a smaller last batch that was to be left out.
    """
    rest = plan.train_size % plan.batch_size
    if plan.drop_last and rest and isinstance(data, LoaderDataset) and not data.is_ours:
        raise ValueError(
            f"drop_last is for data sets; the {data.split} loader ends an epoch in a batch of {rest} rows, so tell the "
            "loader itself: DataLoader(..., drop_last=True)"
        )


def beside_of(data: Dataset) -> Mapping[str, Tensor]:
    """One row [1, ...] of each tensor that the data brings beside its samples."""
    return {name: value[:1].cpu() for name, value in data.beside.items()}


def with_classes(data: Dataset, num_classes: int) -> Dataset:
    """Data that did not know its classes learns them from the model.

    Raises:
        ValueError: the data has more classes than the model tells apart.
    """
    if data.num_classes is not None and data.num_classes > num_classes:
        raise ValueError(f"the {data.split} data has {data.num_classes} classes, the model tells {num_classes} apart")
    if isinstance(data, LoaderDataset):
        return data if data.num_classes else replace(data, num_classes=num_classes)
    if data.open_classes:
        return replace(data, num_classes=num_classes, open_classes=False)
    if not data.num_classes and TargetForm(data.target_shape, data.target_dtype) == CLASS_NUMBER:
        try:
            CLASSIFICATION.check(data.labels, num_classes)
        except ValueError as error:
            raise ValueError(f"the {data.split} data: {error}, which the model tells apart") from None
    return data


def ready(data: Dataset, task: Task, target: TargetForm, num_scores: int, first: nn.Module | None = None) -> Dataset:
    """The data as a run of that task reads it.

    Args:
        first: the network's first block, whose body may have a say in which samples there may be (`check_samples`).

    Raises:
        ValueError: targets that are not of the task, or beyond what the model tells apart; samples that the first block
            refuses.
    """
    data = (
        with_classes(data, num_scores) if task.name == "classification" else with_task(data, task, target, num_scores)
    )
    if check := getattr(getattr(first, "body", None), "check_samples", None):
        data = _with_check(data, check)
    return data


def _with_check(data: Dataset, check: Callable[[Tensor, Mapping[str, Tensor]], None]) -> Dataset:
    if isinstance(data, ImageDataset):
        try:
            check(data.images, data.beside)
        except ValueError as error:
            raise ValueError(f"the {data.split} data: {error}") from None
        return data

    aligned = data.aligned

    def unchanged(samples: Tensor, targets: Tensor | None, beside: Mapping[str, Tensor]) -> Tensor:
        check(samples, beside)
        if aligned is not None:
            return aligned(samples, targets, beside)
        return torch.zeros(len(samples), 0, dtype=torch.uint8) if targets is None else targets

    return replace(data, aligned=unchanged)


def probe_sample(data: Dataset) -> Tensor:
    """One sample's input to follow a network's shapes with: zeros, or the smallest and the largest of known tokens."""
    sample = torch.zeros(data.image_shape, dtype=data.sample_dtype)
    if isinstance(data, ImageDataset) and not data.sample_dtype.is_floating_point:
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

    readers: dict[ItemKind, LoaderReader] = {}

    def reader(data: Dataset, *kinds: ItemKind) -> Source:
        if isinstance(data, ImageDataset):
            return images(data, data)
        one = LoaderReader(data)
        readers.update(dict.fromkeys(kinds, one))
        return one

    source: Source
    if isinstance(train, ImageDataset) and not isinstance(test, LoaderDataset):
        source = images(train, test)
    else:
        source = SplitSource(reader(train, "train", "statistics"), None if test is None else reader(test, "evaluate"))
        skip(readers, plan.items(0, start))
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
        target=TargetForm(train.target_shape, train.target_dtype),
        beside=train.beside,
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
