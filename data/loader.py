"""`LoaderDataset`: what a PyTorch DataLoader, or any iterable of batches, yields, as a dataset.

What is trained on is what the loader yields, in its order; this project's own augmentation and shuffling have no part
in it. A run is reproducible if the loader is: give a shuffling DataLoader a seeded `generator`, or a sampler with
`set_epoch`. Only the process of stage 0 reads; the loader needs no DistributedSampler.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from unlocked.data.batches import FOUND, Names, Parts, parse_batch, readable_type

__all__ = ["LoaderDataset", "is_two_valued", "repeats_inputs"]

_LOOKED_AT = 64  # samples of a data set, where one is not enough to tell by


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoaderDataset:
    """Batches that something else makes; see `wrap`, which finds out all of this by itself.

    An epoch is one iteration over the loader, or its first `steps_per_epoch` batches. BatchNorm's statistics are
    re-estimated from the first batches of a further iteration. An iterator (a generator, say) can't be started anew:
    every epoch, and every re-estimation, goes on where the one before stopped.
    """

    loader: Iterable[Any]
    """Yields batches as `parse_batch` reads them: (samples [B, ...], targets [B, ...]), samples alone, or named
    tensors. Samples of any float type or uint8, which is divided by 255 (see `mean`); those of other integer types are
    tokens and stay as they are."""
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
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """The named tensors, with one row of each: what a batch brings beside samples and targets."""
    target_shape: tuple[int, ...] = ()
    """One sample's."""
    target_dtype: torch.dtype = torch.int64
    """What targets are read as; uint8 of the shape (0,): there are none."""
    has_targets: bool = True
    """Batches bring targets of their own."""
    two_valued: bool = False
    """The targets that were looked at are 0 and 1 alone."""
    repeats_inputs: bool = False
    """The targets that were looked at are the inputs, but for negative ones: of tokens, those of a list's batches or of
    a data set's first samples."""
    is_ours: bool = False
    """The loader was made of an indexable data set, so batches have the rows that somebody asks for."""
    names: Names = FOUND
    mean: tuple[float, ...] = ()
    """Of each channel of samples that come as uint8 [B, C, ...], where 255 counts as 1; empty: 0."""
    std: tuple[float, ...] = ()
    """Likewise; empty: 1."""
    aligned: Callable[[Tensor, Tensor | None, Mapping[str, Tensor]], Tensor] | None = None
    """Makes a batch's targets of its samples, its own targets and its named tensors; None: its own."""
    check_targets: Callable[[Tensor], None] | None = None
    """Raises a ValueError for values of a batch's targets that nothing can be learnt from; None: they are labels."""

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
        main: str | None = None,
        targets: str | None = None,
    ) -> "LoaderDataset":
        """The loader with the sizes that a run must know beforehand.

        A DataLoader is asked for them, and one sample of its dataset is looked at. Of any other iterable the first
        batch is looked at; `len` gives its batches.

        Args:
            steps_per_epoch: batches of an epoch; needed where the loader has no length.
            num_samples: rows of an epoch; needed where the last batch is smaller and the loader is neither a
                DataLoader nor a sequence.
            main, targets: keys of named tensors: what the first layer reads, and the targets; default: by the names
                that are customary (`unlocked.data.batches`).

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
        keys = Names(main, targets)
        parts = parse_batch(first, f"the {split} data", keys)
        samples = parts.samples
        steps = length if steps_per_epoch is None else steps_per_epoch
        if steps is None:
            raise ValueError(f"{what} has no length; give steps_per_epoch, the batches of an epoch")
        if steps < 1 or (length is not None and steps > length):
            raise ValueError(f"steps_per_epoch is {steps}; the {split} data has {length or 'at least one'} batches")
        batch_size, found = _sizes(loader, len(samples), length, keys)
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
            beside={key: value[:1].to(_beside_type(value)).clone() for key, value in parts.beside.items()},
            target_shape=(0,) if parts.targets is None else tuple(parts.targets.shape[1:]),
            target_dtype=torch.uint8 if parts.targets is None else readable_type(parts.targets, as_target=True),
            has_targets=parts.targets is not None,
            two_valued=is_two_valued(parts.targets),
            repeats_inputs=_all_repeat_inputs(loader, parts, keys),
            names=keys,
        )

    def __len__(self) -> int:
        return self.num_samples

    @property
    def is_keyed(self) -> bool:
        """Whether an epoch's batches depend on its number alone, so that a resumed run need not read those before: as
        far as the loader tells. Its samples may still be made by chance, and workers that stay go on with theirs."""
        loader = self.loader
        if isinstance(loader, list | tuple):
            return True
        if getattr(loader, "persistent_workers", False):
            return False
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

    def read_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 samples [B, C, ...] as a network reads them: float32, by the arithmetic of an `ImageDataset`'s."""
        # Numbers in float64, rounded once; the sum is rounded before the product. Every device gives the same bits.
        spread = (-1, *[1] * (pixels.dim() - 2))
        samples = pixels.float()
        if self.mean:
            samples.sub_(torch.tensor([value * 255.0 for value in self.mean]).view(spread))
        return samples.mul_(torch.tensor([1.0 / (value * 255.0) for value in self.std or (1.0,)]).view(spread))

    def pass_over(self, epoch: int) -> None:
        """Leaves out an iteration over a loader that `is_keyed`, but for what a DataLoader draws as each begins: the
        seed of its workers, of its own generator or of torch's. It does so without workers, too."""
        loader = self.loader
        if isinstance(loader, DataLoader) and loader.num_workers:  # which needn't start
            torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
        elif isinstance(loader, DataLoader):
            self.batches(epoch)

    def check(self, batch: Any, rows: int, where: str) -> Parts:
        """The batch's samples [rows, *image_shape], named tensors and targets [rows, *target_shape].

        Raises:
            ValueError: keys, types, shapes or targets are not what they must be; `where` says of which batch.
        """
        parts = parse_batch(batch, where, self.names)
        samples = parts.samples
        if samples.shape[1:] != self.image_shape:
            raise ValueError(
                f"{where}: samples have shape {tuple(samples.shape[1:])}, those before {self.image_shape}; sequences "
                "of different lengths are padded to one (unlocked.data.pad_collate)"
            )
        if _read_as(samples) != self.sample_dtype:
            raise ValueError(f"{where}: samples are {samples.dtype}, those before are read as {self.sample_dtype}")
        if len(samples) != rows:
            raise ValueError(
                f"{where}: {len(samples)} samples where {rows} are due (batches of {self.batch_size}, "
                f"{self.num_samples} samples an epoch); make all batches but the last one equal, and drop that one or "
                "wrap the loader: LoaderDataset.wrap(loader, num_samples=...)"
            )
        self._check_beside(parts, where)
        targets = parts.targets
        if self.aligned is not None:
            try:
                targets = self.aligned(samples.to(self.sample_dtype), targets, parts.beside)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        elif targets is None:
            targets = torch.zeros(len(samples), 0, dtype=torch.uint8)
        form = (tuple(targets.shape[1:]), readable_type(targets, as_target=True))
        if targets.numel() and form != (self.target_shape, self.target_dtype):
            raise ValueError(
                f"{where}: targets are {form[1]} {list(form[0])} per sample, those before {self.target_dtype} "
                f"{list(self.target_shape)}"
            )
        self._check_values(targets, where)
        return Parts(samples, parts.beside, targets)

    def _check_beside(self, parts: Parts, where: str) -> None:
        has_targets = parts.targets is not None
        if parts.beside.keys() != self.beside.keys() or has_targets != self.has_targets:
            now = ", ".join([*parts.beside, *["targets"] * has_targets]) or "nothing"
            before = ", ".join([*self.beside, *["targets"] * self.has_targets]) or "nothing"
            raise ValueError(
                f"{where}: beside the samples the batch has {now}, those before had {before}; every batch has the "
                "same keys"
            )
        for key, one in self.beside.items():
            value = parts.beside[key]
            if value.shape[1:] != one.shape[1:] or _beside_type(value) != one.dtype:
                raise ValueError(
                    f"{where}: {key} is {value.dtype} {list(value.shape[1:])} per sample, before it was {one.dtype} "
                    f"{list(one.shape[1:])}"
                )

    def _check_values(self, targets: Tensor, where: str) -> None:
        try:
            if self.check_targets is not None:
                self.check_targets(targets)
                return
            if self.target_shape or self.target_dtype != torch.int64:
                return
            low, high = (int(bound) for bound in torch.aminmax(targets))
            if low < 0 or (self.num_classes and high >= self.num_classes):
                valid = f" to {self.num_classes - 1}" if self.num_classes else ""
                raise ValueError(f"labels from {low} to {high}; valid: 0{valid or ' and above'}")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

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


def _sizes(loader: Iterable[Any], first_rows: int, length: int | None, names: Names) -> tuple[int, int | None]:
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
        last = parse_batch(loader[-1], "the last batch", names).samples
        return first_rows, (len(loader) - 1) * first_rows + len(last)
    return first_rows, None


def is_two_valued(targets: Tensor | None) -> bool:
    return targets is not None and targets.numel() > 0 and bool(((targets == 0) | (targets == 1)).all())


def repeats_inputs(samples: Tensor, targets: Tensor | None) -> bool:
    if targets is None or targets.shape != samples.shape:
        return False
    return bool(((targets == samples) | (targets < 0)).all())


def _all_repeat_inputs(loader: Iterable[Any], first: Parts, names: Names) -> bool:
    """Of tokens one sample says little: a masked one may have kept what it is to be guessed from. What can't be looked
    at beforehand is held to the answer when its turn comes."""
    if not repeats_inputs(first.samples, first.targets):
        return False
    if _read_as(first.samples) != torch.int64:
        return True
    try:
        with _keyed_chance():
            parts = (parse_batch(batch, "", names) for batch in _more(loader))
            return all(repeats_inputs(samples, targets) for samples, _, targets in parts)
    except Exception:  # of a batch that is at fault the reader tells, by its number
        return True


def _more(loader: Iterable[Any]) -> Iterator[Any]:
    """Batches, or batches of one sample, that can be looked at without disturbing the loader's own order."""
    if isinstance(loader, list | tuple):
        yield from loader
    elif isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        dataset: Any = loader.dataset
        if not isinstance(dataset, IterableDataset):
            yield from (loader.collate_fn([dataset[k]]) for k in range(min(len(dataset), _LOOKED_AT)))


@contextmanager
def _keyed_chance() -> Iterator[None]:
    """What is drawn inside, every process draws alike; what is drawn next is as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _beside_type(values: Tensor) -> torch.dtype:
    """Named tensors stay what they are, but for types that no slot has a use for."""
    if values.is_floating_point():
        return torch.float32
    return values.dtype if values.dtype in (torch.bool, torch.uint8) else torch.int64


def _read_as(samples: Tensor) -> torch.dtype:
    return readable_type(samples)
