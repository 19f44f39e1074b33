"""Sequences of different lengths as tensors of one length, as slots of a fixed size need them: padded, or packed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "pad_collate"]


def pad_collate(length: int, *, padding: int = 0, ignore_index: int = -100) -> Callable[[Sequence[Any]], Any]:
    """A DataLoader's `collate_fn` that pads every sequence at its end to `length` and adds `attention_mask`.

    A sample is a sequence of token ids, a pair (ids, target), or a mapping with `input_ids` and any of `labels`,
    `attention_mask` and others. Targets that have the ids' length are padded with `ignore_index`; other tensors of that
    length with 0.

    Args:
        length: of every sequence; buckets of several lengths would need slots of several sizes.
        padding: the token id of the places that are filled up.

    Raises:
        ValueError: by the function: a sequence that is longer; a sample without ids.
    """
    if length < 1:
        raise ValueError(f"length is {length}; it must be at least 1")

    def one(sample: Any, number: int) -> dict[str, Tensor]:
        if isinstance(sample, tuple):
            sample = {"input_ids": sample[0], "labels": sample[1]}
        elif not isinstance(sample, Mapping):
            sample = {"input_ids": sample}
        if "input_ids" not in sample:
            raise ValueError(f"sample {number} of the batch has no input_ids, only {', '.join(map(str, sample))}")
        held = {key: torch.as_tensor(value) for key, value in sample.items()}
        size = len(held["input_ids"])
        if size > length:
            raise ValueError(f"sample {number} of the batch has {size} tokens, the length is {length}; cut it, or pack")
        held.setdefault("attention_mask", torch.ones(size, dtype=torch.int64))
        fill = {"input_ids": padding, "labels": ignore_index}
        return {
            key: value if value.dim() != 1 or len(value) != size else _filled(value, length, fill.get(key, 0))
            for key, value in held.items()
        }

    def collate(samples: Sequence[Any]) -> dict[str, Tensor]:
        rows = [one(sample, number) for number, sample in enumerate(samples)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    return collate


def pack(sequences: Iterable[Any], length: int, *, separator: int | None = None) -> Tensor:
    """All sequences end to end, in rows of `length`: int64 [N, length]; what is left over at the end is dropped.

    Args:
        separator: a token id that follows each of them; None: nothing does.

    Raises:
        ValueError: they don't fill a row.
    """
    parts: list[Tensor] = []
    for sequence in sequences:
        parts.append(torch.as_tensor(sequence, dtype=torch.int64))
        if separator is not None:
            parts.append(torch.tensor([separator]))
    whole = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    rows = len(whole) // max(length, 1)
    if length < 1 or rows < 1:
        raise ValueError(f"{len(whole)} tokens don't fill a row of length {length}")
    return whole[: rows * length].view(rows, length)


def _filled(values: Tensor, length: int, fill: int) -> Tensor:
    return torch.cat([values, values.new_full((length - len(values),), fill)])
