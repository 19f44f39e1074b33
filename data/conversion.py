"""Data that comes in another form than a run reads: turned into it where nothing is lost, with a line that says so."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from unlocked.data.batches import Parts, parse_batch
from unlocked.data.order import epoch_order

__all__ = ["KeyedSampler", "convert"]

_INTEGERS = {
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
}
_TOKENS = ("int8", "int16", "int32", "int64")


class KeyedSampler(Sampler[int]):
    """Visits `size` samples in the order that an `ImageDataset` of that size has in the same epoch (`epoch_order`)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed, self._epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Every iteration from here on is that epoch's."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self._size, self._seed, self._epoch).tolist())


def convert(data: Any, split: str, *, batch_size: int | None, seed: int | None) -> Any:
    """`data` as something that a run reads, or as it is.

    A pair of arrays or tensors, and a TensorDataset of two, become a tuple (samples, labels int64 [N]), or `Parts`
    where the targets are no class numbers: samples of other float types float32, of other integer types int64. Named
    tensors [N, ...], alone or with targets, and tokens without targets become `Parts`. An indexable PyTorch Dataset, a
    subclass of TensorDataset too, becomes a DataLoader. What changes a type is told by a `UserWarning` of one line.

    Args:
        split: what the data is called in errors: train or test.
        batch_size: rows of a batch, for an indexable Dataset.
        seed: keys the order in which an indexable Dataset is read; None: one after the other.

    Raises:
        ValueError: data of a kind, or with values, that no conversion keeps; says what to give.
    """
    what = f"the {split} data"
    if type(data) is TensorDataset:  # a subclass may make other samples of its tensors, so it is read by its indices
        if len(data.tensors) == 1 and data.tensors[0].dtype in _INTEGERS - {torch.uint8}:
            return _named({"input_ids": data.tensors[0]}, None, what)
        if len(data.tensors) != 2:
            raise ValueError(f"{what} is a TensorDataset of {len(data.tensors)} tensors; give one of (samples, labels)")
        return _pair(data.tensors[0], data.tensors[1], what)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Mapping):
        return _named(data[0], data[1], what)
    if isinstance(data, Mapping):
        return _named(data, None, what)
    if isinstance(data, Tensor | np.ndarray) and data.ndim == 2 and str(data.dtype).removeprefix("torch.") in _TOKENS:
        return _named({"input_ids": data}, None, what)
    if isinstance(data, tuple | list) and len(data) == 2:
        if all(isinstance(part, Tensor | np.ndarray) for part in data) and (
            isinstance(data, tuple) or data[1].ndim == 1
        ):
            return _pair(data[0], data[1], what)
        if all(isinstance(part, Dataset) or type(part).__name__ in ("ImageDataset", "LoaderDataset") for part in data):
            raise ValueError(f"{what} is two datasets; give the first alone, and the second as eval_data")
    if isinstance(data, Tensor | np.ndarray | str | bytes | Mapping) or data is None:
        raise ValueError(
            f"{what} is a {type(data).__name__}; give a dataset, two tensors or arrays (samples, labels), or a "
            "DataLoader or another iterable of batches"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and not hasattr(data, "__iter__"):
        return _loader(data, what, batch_size, seed)
    return data


def _loader(data: Any, what: str, batch_size: int | None, seed: int | None) -> DataLoader[Any]:
    name = type(data).__name__
    try:
        size = len(data)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"{what} ({name}) has no length; give a DataLoader of it") from error
    if batch_size is None:
        raise ValueError(f"{what} is a {name}; give batch_size, the rows of a micro-batch")
    if size == 0:
        raise ValueError(f"{what} ({name}) is empty")
    order = "one after the other" if seed is None else "in an order keyed by seed and epoch"
    _say(f"{what} ({name}) is read through a DataLoader, {order}")
    sampler = None if seed is None else KeyedSampler(size, seed)
    return DataLoader(data, batch_size=min(batch_size, size), sampler=sampler)


def _pair(samples: Tensor | np.ndarray, labels: Tensor | np.ndarray, what: str) -> tuple[Tensor, Tensor] | Parts:
    told: list[str] = []
    samples, labels = _tensor(samples, f"{what}: samples"), _tensor(labels, f"{what}: labels")
    if samples.dtype in _INTEGERS - {torch.uint8, torch.int64}:
        told.append(f"{_name(samples)} samples are read as tokens, int64")
        samples = samples.to(torch.int64)
    elif samples.is_floating_point() and samples.dtype != torch.float32:
        told.append(f"{_name(samples)} samples are read as float32")
        samples = _as_float32(samples, what)
    if not (labels.dtype in _INTEGERS and (labels.dim() < 2 or labels.shape[1:] == (1,))):
        if labels.is_floating_point() and labels.dtype != torch.float32:
            told.append(f"{_name(labels)} targets are read as float32")
        if told:
            _say(f"{what}: {'; '.join(told)}")
        return parse_batch((samples, labels), what)
    if labels.dim() == 2 and labels.shape[1] == 1:
        told.append(f"labels {list(labels.shape)} are read as [{len(labels)}]")
        labels = labels[:, 0]
    if labels.dtype != torch.int64:
        told.append(f"{_name(labels)} labels are read as int64")
        labels = labels.to(torch.int64)
    if labels.numel() == 0:
        raise ValueError(f"{what} is empty: labels {list(labels.shape)}")
    if int(labels.min()) < 0:
        raise ValueError(f"{what}: labels go down to {int(labels.min())}; they are numbers of classes, from 0 on")
    if told:
        _say(f"{what}: {'; '.join(told)}")
    return samples, labels


def _named(named: Mapping[str, Any], targets: Any, what: str) -> Parts:
    """Whole tensors [N, ...] by name."""
    tensors = {}
    for name, value in named.items():
        if value is not None and not isinstance(value, Tensor | np.ndarray):
            raise ValueError(
                f"{what}: {name} is a {type(value).__name__}; give tensors or arrays [N, ...], all of one length"
            )
        tensors[name] = None if value is None else _tensor(value, f"{what}: {name}")
    if targets is not None:
        targets = _tensor(targets, f"{what}: targets")
    parts = parse_batch(tensors if targets is None else (tensors, targets), what)
    samples = parts.samples
    if samples.is_floating_point():
        samples = _as_float32(samples, what)
    elif samples.dtype != torch.uint8 or samples.dim() != 4:
        samples = samples.to(torch.int64)
    return parts._replace(samples=samples)


def _tensor(values: Tensor | np.ndarray, what: str) -> Tensor:
    """The same values, dense and without a history."""
    if isinstance(values, np.ndarray):
        values = _of_numpy(values, what)
    if values.layout != torch.strided or values.is_quantized or values.is_meta or values.is_complex():
        raise ValueError(f"{what} are a sparse, quantised, complex or empty tensor ({values.dtype}); give a dense one")
    return values.detach()


def _of_numpy(values: np.ndarray, what: str) -> Tensor:
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        raise ValueError(f"{what} are an array of {values.dtype}; give one of numbers")
    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an array that is closed for writing is only read
        return torch.from_numpy(native)


def _as_float32(samples: Tensor, what: str) -> Tensor:
    narrow = samples.float()
    if not torch.equal(narrow.isfinite(), samples.isfinite()):
        raise ValueError(f"{what}: samples go beyond float32 (3.4e38); scale them")
    return narrow


def _name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _say(text: str) -> None:
    """At the line that called `fit`, as far as it is on the way: conversion, as_dataset, fit, caller."""
    warnings.warn(text, stacklevel=6)
