"""A layer's file in a snapshot: its whole state, with the run, the position and the layer that it belongs to, and a
checksum over all of it.

A file is asked for its size before anything of it takes memory, and what a tensor in it claims to hold must lie in the
file.
"""

import copy
import hashlib
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.saving.tensor_file import load_tensors, save_tensors
from unlocked.runtime.saving.whole_file import whole_file
from unlocked.runtime.tensors import tensor_bytes

__all__ = [
    "UNREADABLE",
    "LayerFile",
    "damaged",
    "layer_file_name",
    "read_layer",
    "state_digest",
    "write_layer",
]

UNREADABLE = (
    *(RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, OSError, pickle.UnpicklingError),
    *(struct.error, AssertionError, OverflowError, MemoryError, zipfile.BadZipFile),
)
"""What reading a file that is not what it should be can raise."""

_CHECKSUM = "sha256"
_OWNER = ("run", "position", "layer")


class LayerFile(NamedTuple):
    """What a manifest knows of a layer's file."""

    size: int
    """Bytes."""
    sha256: str
    """Of its content (`state_digest`)."""


def layer_file_name(index: int, name: str) -> str:
    """The file of a layer in every snapshot's folder."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return f"layer-{index:03d}-{safe}.pt"


def write_layer(path: Path, state: Mapping[str, Any], *, run: str, position: int, layer: str) -> LayerFile:
    """Writes a layer's state as `Layer.state_dict` gives it; a reader never sees a half-written file.

    Raises:
        DiskFullError: there is no room for it (names it).
    """
    content = {**state, "run": run, "position": position, "layer": layer}
    digest = state_digest(content)
    with whole_file(path) as temporary:
        save_tensors({**content, _CHECKSUM: digest}, temporary)
        size = temporary.stat().st_size
    return LayerFile(size, digest)


def read_layer(
    path: Path,
    device: torch.device,
    *,
    written: LayerFile | None = None,
    run: str | None = None,
    position: int | None = None,
    layer: str | None = None,
) -> dict[str, Any]:
    """What `Layer.state_dict` gave when the file was written.

    Args:
        device: where its tensors go.
        written: what the manifest says of the file; None: the file speaks for itself.
        run, position, layer: to which it must belong, where they are given.

    Raises:
        ValueError: it is not the file that was written there: of another size, run, position or layer, or its content
            does not have the checksum that was written with it.
        Others: the file can't be read as a file of tensors (`UNREADABLE`).
    """
    if written is not None and (size := path.stat().st_size) != written.size:
        raise ValueError(f"it has {size} bytes where {written.size} were written")
    state = load_tensors(path)
    digest = state.pop(_CHECKSUM)
    owner = {name: state[name] for name in _OWNER}
    if state_digest(state) != digest:
        raise ValueError("its content does not have the checksum that was written with it")
    due = {"run": run, "position": position, "layer": layer}
    if wrong := [
        f"{name} {owner[name]}, not {value}" for name, value in due.items() if value not in (None, owner[name])
    ]:
        raise ValueError(f"it is of {', '.join(wrong)}")
    if written is not None and digest != written.sha256:
        raise ValueError("it is not the one that the snapshot was completed with: its checksum is another")
    return {name: _moved(value, device) for name, value in state.items() if name not in _OWNER}


def damaged(path: Path, error: Exception) -> str:
    """What to say of a layer's file that could not be taken over."""
    return f"snapshot file {path} is damaged or of another network: {first_line(error)}"


def state_digest(state: object) -> str:
    """SHA-256 over everything in a layer's state: names, numbers, and the tensors' types, shapes and bytes."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        moved = copy.copy(value)  # with what a module notes beside its state
        for key, item in value.items():
            moved[key] = _moved(item, device)
        return moved
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value


def _feed(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(tensor_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"map of {len(value)}".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"list of {len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{type(value).__name__} {value!r}".encode())
