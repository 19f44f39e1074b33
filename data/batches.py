"""What a batch is made of: the main input, named tensors beside it, and targets or none."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["FOUND", "MAIN_NAMES", "TARGET_NAMES", "Names", "Parts", "parse_batch", "readable_type"]

TARGET_NAMES = ("labels", "targets", "target")
"""Keys of a batch that hold its targets; the first that is there."""
MAIN_NAMES = ("input_ids", "inputs_embeds", "pixel_values", "inputs", "input", "x", "samples", "images")
"""Keys that hold what the first layer reads; the first that is there, else the batch's first tensor."""


class Names(NamedTuple):
    """Of a batch's keys, where they are not found by themselves."""

    main: str | None = None
    targets: str | None = None


FOUND = Names()


class Parts(NamedTuple):
    """A batch, or a whole set of samples."""

    samples: Tensor
    """[B, ...]"""
    beside: Mapping[str, Tensor]
    """Each [B, ...], by key."""
    targets: Tensor | None
    """[B, ...]"""


def parse_batch(batch: Any, where: str, names: Names = FOUND) -> Parts:
    """The parts of (samples, targets), of samples alone, of a mapping (a NamedTuple is one), or of (mapping, targets).

    Raises:
        ValueError: it is none of these, or its tensors don't have the same number of rows; `where` says of which batch.
    """
    given: Any = batch
    targets: Any = None
    if isinstance(given, tuple) and hasattr(given, "_asdict"):
        given = given._asdict()
    if isinstance(given, tuple | list) and len(given) in (1, 2):
        given, targets = (*given, None)[:2]
    if not isinstance(given, Mapping):
        return _checked(Parts(_tensor(given, batch, where), {}, _target(targets, batch, where)), where)
    held = {str(key): value for key, value in given.items() if value is not None}
    target_name = names.targets or next((name for name in TARGET_NAMES if name in held), None)
    if targets is None and target_name is not None:
        targets = _taken(held, target_name, "targets", where)
    if not held:
        raise ValueError(f"{where}: the batch has no input, only {target_name}")
    tensors = {name: _tensor(value, batch, f"{where}, {name}") for name, value in held.items()}
    main = names.main or next((name for name in MAIN_NAMES if name in tensors), next(iter(tensors)))
    samples = _taken(tensors, main, "main input", where)
    return _checked(Parts(samples, tensors, _target(targets, batch, where)), where, main)


def readable_type(values: Tensor, *, as_target: bool = False) -> torch.dtype:
    """What a tensor is read as: float32 of any float; int64 of integers, bool of truth values; uint8 samples become
    float32."""
    if values.is_floating_point():
        return torch.float32
    if values.dtype == torch.bool:
        return torch.bool
    return torch.float32 if values.dtype == torch.uint8 and not as_target else torch.int64


def _taken(held: dict[str, Any], name: str, word: str, where: str) -> Any:
    if name not in held:
        raise ValueError(f"{where}: the batch has no key {name!r} for its {word}; there is {', '.join(held)}")
    return held.pop(name)


def _tensor(value: Any, batch: Any, where: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        found = type(batch).__name__ + (f" of {len(batch)}" if isinstance(batch, list | tuple | Mapping) else "")
        raise ValueError(
            f"{where}: a batch is (samples, labels), two tensors, or named tensors; got a {found} ({error})"
        ) from error


def _target(value: Any, batch: Any, where: str) -> Tensor | None:
    return None if value is None else _tensor(value, batch, f"{where}, targets")


def _checked(parts: Parts, where: str, main: str = "samples") -> Parts:
    samples, beside, targets = parts
    if samples.dim() < 2 or samples.numel() == 0 or samples.is_complex() or samples.dtype == torch.bool:
        raise ValueError(
            f"{where}: samples are a float, uint8 or (tokens) integer tensor [B, ...] with no size 0, got "
            f"{samples.dtype} {list(samples.shape)}"
        )
    for name, value in beside.items():
        if value.dim() < 1 or len(value) != len(samples):
            raise ValueError(f"{where}: {name} has the shape {list(value.shape)}, {main} {list(samples.shape)}")
        if name.endswith("mask") and value.dim() == samples.dim() == 2 and value.shape != samples.shape:
            raise ValueError(
                f"{where}: {name} has the shape {list(value.shape)}, {main} {list(samples.shape)}; a mask has a value "
                "for every position"
            )
    if targets is not None and (targets.is_complex() or targets.dim() < 1 or len(targets) != len(samples)):
        raise ValueError(
            f"{where}: labels are [{len(samples)}, ...], one for each sample, got {targets.dtype} {list(targets.shape)}"
        )
    return parts
