"""Snapshots: one file per layer, keyed by the layer's name, so that a run resumes with any number of stages.

A snapshot is a folder `step-NNNNNNNN` below the run's snapshot folder. Every stage writes its layers' files when it
reaches the mark in the stream (upstream stages are further on by then: nothing waits). When all have, the manifest is
written; a folder without one does not count. Local rules keep no state across layers, so this is the whole run.
"""

import hashlib
import json
import pickle
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.result import tensor_bytes
from unlocked.runtime.saving.whole_file import whole_file, write_whole
from unlocked.workers.layer import Layer

__all__ = [
    "UNREADABLE",
    "Snapshot",
    "damaged",
    "find_snapshot",
    "layer_file_name",
    "load_layers",
    "read_layer",
    "save_layers",
    "snapshot_folder",
    "state_digest",
    "write_manifest",
]

_MANIFEST = "manifest.json"
_CHECKSUM = "sha256"
UNREADABLE = (
    *(RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, OSError, pickle.UnpicklingError),
    *(struct.error, AssertionError, OverflowError, MemoryError),
)
"""What reading a file that is not what it should be can raise."""
_FORMAT = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot.

    Attributes:
        folder: where its files lie.
        position: the stream position at which a resumed run goes on.
        steps: training micro-batches done.
        settings: what must be the same in the resumed run.
        test_losses: (epoch, test loss) of the epochs before, where the learning rate depends on them.
    """

    folder: Path
    position: int
    steps: int
    settings: Mapping[str, Any]
    test_losses: tuple[tuple[int, float], ...] = ()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises a ValueError that lists every setting which differs from the run that wrote the snapshot."""
        wrong = [
            f"{name} is {settings.get(name)!r} but was {value!r}"
            for name, value in self.settings.items()
            if settings.get(name) != value
        ]
        if wrong:
            raise ValueError(f"can't resume from {self.folder}: {'; '.join(wrong)}; give the same settings")


def snapshot_folder(root: Path, steps: int) -> Path:
    """The folder of the snapshot after `steps` training micro-batches."""
    return root / f"step-{steps:08d}"


def layer_file_name(index: int, name: str) -> str:
    """The file of a layer in every snapshot's folder."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return f"layer-{index:03d}-{safe}.pt"


def save_layers(folder: Path, layers: Iterable[Layer]) -> None:
    """Writes each layer's file; a reader never sees a half-written one.

    A snapshot that an earlier run has left in the folder does not count from here on: its files are being replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    for layer in layers:
        with whole_file(folder / layer_file_name(layer.info.index, layer.name)) as temporary:
            state = layer.state_dict()
            torch.save({**state, _CHECKSUM: state_digest(state)}, temporary)


def load_layers(snapshot: Snapshot, layers: Iterable[Layer]) -> None:
    """Restores the given layers.

    Raises:
        ValueError: a layer's file is missing, damaged or of another network (names it).
    """
    for layer in layers:
        path = snapshot.folder / layer_file_name(layer.info.index, layer.name)
        try:
            layer.load_state_dict(read_layer(path, layer.device))
        except FileNotFoundError as error:
            raise ValueError(f"snapshot {snapshot.folder} has no file {path.name} for layer {layer.name}") from error
        except UNREADABLE as error:
            raise ValueError(damaged(path, error)) from error


def damaged(path: Path, error: Exception) -> str:
    """What to say of a layer's file that could not be taken over."""
    return f"snapshot file {path} is damaged or of another network: {first_line(error)}"


def read_layer(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Layer.state_dict` gave when the file was written.

    Raises:
        ValueError: its content does not have the checksum that was written with it.
        Others: the file can't be read as a file of tensors.
    """
    state = torch.load(path, map_location=device, weights_only=True)
    expected = state.pop(_CHECKSUM)
    if state_digest(state) != expected:
        raise ValueError("its content does not have the checksum that was written with it")
    return dict(state)


def state_digest(state: object) -> str:
    """SHA-256 over everything in a layer's state: names, numbers, and the tensors' types, shapes and bytes."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def write_manifest(
    root: Path,
    *,
    position: int,
    steps: int,
    settings: Mapping[str, Any],
    test_losses: Iterable[tuple[int, float]] = (),
) -> None:
    """Declares the snapshot after `steps` complete."""
    content = {
        "format": _FORMAT,
        "position": position,
        "steps": steps,
        "settings": dict(settings),
        "test_losses": list(test_losses),
    }
    write_whole(snapshot_folder(root, steps) / _MANIFEST, json.dumps(content, indent=1))


def find_snapshot(root: Path) -> Snapshot:
    """The newest complete snapshot below `root` (or `root` itself, if it is one).

    Raises:
        ValueError: there is none (says where it looked), or its manifest is damaged.
    """
    folders = [root] if (root / _MANIFEST).is_file() else sorted(root.glob("step-*"), key=_by_number, reverse=True)
    for folder in folders:
        path = folder / _MANIFEST
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            position, steps, settings = int(content["position"]), int(content["steps"]), dict(content["settings"])
            losses = tuple((int(epoch), float(loss)) for epoch, loss in content.get("test_losses", ()))
            written = content.get("format")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"snapshot manifest {path} is damaged: {error}") from error
        if written != _FORMAT:
            raise ValueError(f"snapshot {folder} has format {written}, this release reads {_FORMAT}; start anew")
        return Snapshot(folder, position, steps, settings, losses)
    raise ValueError(
        f"no complete snapshot below {root}; --resume takes the folder that a run with --snapshot-every wrote"
    )


def _by_number(folder: Path) -> tuple[int, str]:
    """Orders `step-NNNNNNNN` by its number, also beyond the eight digits that names are padded to."""
    return len(folder.name), folder.name


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
