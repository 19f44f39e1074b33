"""What a run is of, in words and digests: the data and the network's settings, so that no other run's snapshot is taken
for this one's; and what differs between two such descriptions."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.data import Dataset, ImageDataset
from unlocked.runtime.network import Network
from unlocked.runtime.tensors import tensor_bytes

__all__ = ["describe_data", "describe_network", "differences"]

_SAMPLED = 64  # samples, spread over the data
_LONGEST = 60  # characters of a value in an error
_PLAIN = (bool, int, float, str)


def describe_data(data: Dataset) -> dict[str, Any]:
    """Name, size and form of the data, how it is read, and a digest of some of its samples with their labels. A loader
    has no digest: reading from it would move it on."""
    known: dict[str, Any] = {
        "name": data.name,
        "size": len(data),
        "sample": list(data.image_shape),
        "type": str(data.sample_dtype).removeprefix("torch."),
        "classes": data.num_classes,
    }
    if not isinstance(data, ImageDataset):
        return known
    size = len(data)
    rows = torch.tensor(sorted({i * (size - 1) // max(_SAMPLED - 1, 1) for i in range(_SAMPLED)}))
    digest = hashlib.sha256()
    for whole in (data.images, data.labels):
        digest.update(tensor_bytes(whole[rows.to(whole.device)]))
    if data.text_digest:
        known["text"] = data.text_digest
    for name, whole in data.beside.items():
        known[name] = hashlib.sha256(tensor_bytes(whole[rows.to(whole.device)])).hexdigest()[:16]
    reading = hashlib.sha256(f"{data.augmentation} {data.mean} {data.std} {data.margin}".encode())
    return {**known, "digest": digest.hexdigest()[:16], "reading": reading.hexdigest()[:16]}


def describe_network(network: Network) -> dict[str, str]:
    """{layer: the settings of its modules}: whatever number or name a module holds, its dropout's probability for one,
    the shapes of its tensors, and what of it is frozen."""
    return {name: _settings(block) for name, block in zip(network.names, network.blocks, strict=True)}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, mine, theirs) of everything that differs, as text that is short enough for one line."""
    return [(name, _shown(a), _shown(b)) for name, a, b in _differences("", mine, theirs)]


def _settings(block: nn.Module) -> str:
    """One text, the same in every process."""
    modules = [f"{name or 'block'}={_module(module)}" for name, module in block.named_modules()]
    return "; ".join(modules)


def _module(module: nn.Module) -> str:
    own = vars(module)
    plain = [
        f"{key}={value!r}" for key, value in sorted(own.items()) if not key.startswith("_") and _is_plain(key, value)
    ]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    shapes = [f"{key}:{'x'.join(map(str, value.shape))}{_frozen(value)}" for key, value in tensors]
    return f"{type(module).__name__}({', '.join([*plain, *shapes])})"


def _is_plain(key: str, value: object) -> bool:
    if key == "training":
        return value is False  # frozen by its owner
    if key == "start_key":
        return False  # of the start values' draws: the seed, which has a line of its own
    parts = value if isinstance(value, tuple | list) else (value,)
    return all(part is None or isinstance(part, _PLAIN) for part in parts)


def _frozen(value: Tensor) -> str:
    return " frozen" if isinstance(value, nn.Parameter) and not value.requires_grad else ""


def _differences(name: str, mine: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    if mine == theirs:
        return
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in dict.fromkeys([*theirs, *mine]):
            yield from _differences(f"{name}.{key}" if name else str(key), mine.get(key), theirs.get(key))
        return
    if isinstance(mine, str) and isinstance(theirs, str) and max(len(mine), len(theirs)) > _LONGEST:
        yield name, *_parts(mine, theirs)
        return
    yield name, mine, theirs


def _parts(mine: str, theirs: str) -> tuple[str, str]:
    """Of two long texts what is not in both, word by word."""
    a, b = mine.split(), theirs.split()
    return " ".join(_without(a, b)) or mine, " ".join(_without(b, a)) or theirs


def _without(words: list[str], others: list[str]) -> list[str]:
    known = set(others)
    return [word for word in words if word not in known]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 4 * _LONGEST else f"{text[: 4 * _LONGEST]}..."
