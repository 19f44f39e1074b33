"""`LoaderDataset`: what a PyTorch DataLoader, or any iterable of batches, yields, as a dataset.

What is trained on is what the loader yields, in its order; this project's own augmentation and shuffling have no part
in it. A run is reproducible if the loader is: give a shuffling DataLoader a seeded `generator`, or a sampler with
`set_epoch`. Only the process of stage 0 reads; the loader needs no DistributedSampler.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

__all__ = ["LoaderDataset"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoaderDataset:
    """Batches that something else makes; see `wrap`, which finds out all of this by itself.

    An epoch is one iteration over the loader, or its first `steps_per_epoch` batches. BatchNorm's statistics are
    re-estimated from the first batches of a further iteration. An iterator (a generator, say) can't be started anew:
    every epoch, and every re-estimation, goes on where the one before stopped.
    """

    loader: Iterable[Any]
    """Yields (samples [B, ...] of any float type, uint8 or int64, labels [B] of any integer type); uint8 is divided by
    255, int64 samples are tokens and stay as they are."""
    image_shape: tuple[int, ...]
    """One sample's."""
    batch_size: int
    num_samples: int
    """Of an epoch. All batches have `batch_size` rows; the last one of an epoch holds what is left over."""
    num_classes: int | None = None
    """Labels are in [0, num_classes). None: as many as the model tells apart."""
    name: str = "loader"
    split: str = "train"
    sample_dtype: torch.dtype = torch.float32
    """What a network reads: float32, or int64 of tokens."""
    is_cut: bool = False
    """Whether an epoch may end before the loader does."""

    @classmethod
    def wrap(
        cls,
        loader: Iterable[Any],
        *,
        num_classes: int | None = None,
        steps_per_epoch: int | None = None,
        num_samples: int | None = None,
        name: str = "loader",
        split: str = "train",
    ) -> "LoaderDataset":
        """The loader with the sizes that a run must know beforehand.

        A DataLoader is asked for them, and one sample of its dataset is looked at. Of any other iterable the first
        batch is looked at; `len` gives its batches.

        Args:
            steps_per_epoch: batches of an epoch; needed where the loader has no length.
            num_samples: rows of an epoch; needed where the last batch is smaller and the loader is neither a
                DataLoader nor a sequence.

        Raises:
            ValueError: no length and no `steps_per_epoch`; or what it yields is no batch.
        """
        what = f"the {split} data ({type(loader).__name__})"
        length = _length(loader)
        if length == 0:
            raise ValueError(f"{what} has no batches")
        if getattr(getattr(loader, "sampler", None), "num_replicas", 1) > 1:
            raise ValueError(
                f"the {split} data has a sampler that gives every rank a share, but stage 0 reads for all stages; "
                "give the loader a plain sampler"
            )
        try:
            if isinstance(loader, Iterator):
                loader = _Continued(loader)
            first = _probe(loader)
        except Exception as error:
            raise ValueError(f"{what} gives no batch: {type(error).__name__}: {error}") from error
        samples, _ = _tensors(first, f"the {split} data")
        steps = length if steps_per_epoch is None else steps_per_epoch
        if steps is None:
            raise ValueError(f"{what} has no length; give steps_per_epoch, the batches of an epoch")
        if steps < 1 or (length is not None and steps > length):
            raise ValueError(f"steps_per_epoch is {steps}; the {split} data has {length or 'at least one'} batches")
        batch_size, found = _sizes(loader, len(samples), length)
        rows = num_samples or found or steps * batch_size
        if steps_per_epoch is not None:
            rows = min(rows, steps_per_epoch * batch_size)
        if -(-rows // batch_size) != steps:
            raise ValueError(
                f"the {split} data yields {steps} batches of {batch_size} rows an epoch, which can't be {rows} samples"
            )
        return cls(
            loader=loader,
            image_shape=tuple(samples.shape[1:]),
            batch_size=min(batch_size, rows),
            num_samples=rows,
            num_classes=num_classes,
            name=name,
            split=split,
            sample_dtype=_read_as(samples),
            is_cut=steps_per_epoch is not None or isinstance(loader, _Continued),
        )

    def __len__(self) -> int:
        return self.num_samples

    @property
    def is_keyed(self) -> bool:
        """Whether an epoch's batches depend on its number alone, so that a resumed run need not read those before."""
        loader = self.loader
        if isinstance(loader, list | tuple):
            return True
        dataset = getattr(loader, "dataset", None)  # alone it decides what a sample is, not which ones come
        in_order = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
        if in_order and loader.generator is None and not isinstance(dataset, IterableDataset):  # type: ignore[attr-defined]
            return True
        return any(owner is not dataset or isinstance(owner, IterableDataset) for owner in self._owners())

    def batches(self, epoch: int) -> Iterator[Any]:
        """Begins an iteration: tells the loader the epoch, where it listens, and returns what it yields, unchecked."""
        for owner in self._owners():
            owner.set_epoch(epoch)
        return iter(self.loader)

    def check(self, batch: Any, rows: int, where: str) -> tuple[Tensor, Tensor]:
        """The batch's samples [rows, *image_shape] and labels [rows] as tensors.

        Raises:
            ValueError: types, shapes or labels are not what they must be; `where` says of which batch.
        """
        samples, labels = _tensors(batch, where)
        if samples.shape[1:] != self.image_shape:
            raise ValueError(f"{where}: samples have shape {tuple(samples.shape[1:])}, those before {self.image_shape}")
        if _read_as(samples) != self.sample_dtype:
            raise ValueError(f"{where}: samples are {samples.dtype}, those before are read as {self.sample_dtype}")
        if len(samples) != rows:
            raise ValueError(
                f"{where}: {len(samples)} samples where {rows} are due (batches of {self.batch_size}, "
                f"{self.num_samples} samples an epoch); make all batches but the last one equal, and drop that one or "
                "wrap the loader: LoaderDataset.wrap(loader, num_samples=...)"
            )
        low, high = (int(bound) for bound in torch.aminmax(labels))
        if low < 0 or (self.num_classes is not None and high >= self.num_classes):
            valid = "" if self.num_classes is None else f" to {self.num_classes - 1}"
            raise ValueError(f"{where}: labels from {low} to {high}; valid: 0{valid or ' and above'}")
        return samples, labels

    def _owners(self) -> list[Any]:
        """Everything of the loader that has a `set_epoch`, each once."""
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        places = [
            self.loader,
            getattr(self.loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
            getattr(self.loader, "dataset", None),
        ]
        found = {id(place): place for place in places if callable(getattr(place, "set_epoch", None))}
        return list(found.values())


class _Continued:
    """An iterator of which one batch was looked at."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.first = next(iterator)
        self._all = chain([self.first], iterator)

    def __iter__(self) -> Iterator[Any]:
        return self._all


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _probe(loader: Iterable[Any]) -> Any:
    """One batch, or a batch of one sample: what does not disturb the loader's own order."""
    if isinstance(loader, _Continued):
        return loader.first
    if isinstance(loader, DataLoader) and loader.batch_size is not None:
        dataset: Any = loader.dataset
        if not isinstance(dataset, IterableDataset):
            with torch.random.fork_rng(devices=[]):
                return loader.collate_fn([dataset[0]])
    return next(iter(loader))


def _sizes(loader: Iterable[Any], first_rows: int, length: int | None) -> tuple[int, int | None]:
    """(rows of a batch, rows of an epoch if known)."""
    if isinstance(loader, DataLoader):
        maker = loader if loader.batch_size is not None else loader.batch_sampler
        batch_size = getattr(maker, "batch_size", None)
        if batch_size is None or length is None:
            return batch_size or first_rows, None
        samples = loader.dataset if isinstance(loader.dataset, IterableDataset) else getattr(maker, "sampler", None)
        dropped = getattr(maker, "drop_last", True)
        return batch_size, None if dropped else _length(samples)  # type: ignore[arg-type]
    if isinstance(loader, Sequence):
        last, _ = _tensors(loader[-1], "the last batch")
        return first_rows, (len(loader) - 1) * first_rows + len(last)
    return first_rows, None


def _tensors(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    try:
        samples, labels = batch
        samples, labels = torch.as_tensor(samples), torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        found = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else "")
        raise ValueError(f"{where}: a batch is (samples, labels), two tensors; got a {found} ({error})") from error
    known = samples.is_floating_point() or samples.dtype in (torch.uint8, torch.int64)
    if samples.dim() < 2 or samples.numel() == 0 or not known:
        raise ValueError(
            f"{where}: samples are a float, uint8 or (tokens) int64 tensor [B, ...] with no size 0, got "
            f"{samples.dtype} {list(samples.shape)}"
        )
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not integers or labels.shape != samples.shape[:1]:
        raise ValueError(
            f"{where}: labels are integers [{len(samples)}], one for each sample, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    return samples, labels


def _read_as(samples: Tensor) -> torch.dtype:
    return torch.int64 if samples.dtype == torch.int64 else torch.float32
