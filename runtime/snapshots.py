"""Snapshots: one file per layer, keyed by the layer's name, so that a run resumes with any number of stages.

A snapshot is a folder `step-NNNNNNNN` below the run's snapshot folder. Every stage writes its layers' files when it
reaches the mark in the stream (upstream stages are further on by then: nothing waits). When all have, the manifest is
written; a folder without one does not count. Local rules keep no state across layers, so this is the whole run.
"""

import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unlocked.workers.layer import Layer

__all__ = ["Snapshot", "find_snapshot", "load_layers", "save_layers", "snapshot_folder", "write_manifest"]

_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot.

    Attributes:
        folder: where its files lie.
        position: the stream position at which a resumed run goes on.
        steps: training micro-batches done.
        settings: what must be the same in the resumed run.
    """

    folder: Path
    position: int
    steps: int
    settings: Mapping[str, Any]

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


def save_layers(folder: Path, layers: Iterable[Layer]) -> None:
    """Writes each layer's file; a reader never sees a half-written one."""
    folder.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        with _replacing(folder / _file_name(layer)) as temporary:
            torch.save(layer.state_dict(), temporary)


def load_layers(snapshot: Snapshot, layers: Iterable[Layer]) -> None:
    """Restores the given layers.

    Raises:
        ValueError: a layer's file is missing or damaged (names it).
    """
    for layer in layers:
        path = snapshot.folder / _file_name(layer)
        try:
            state = torch.load(path, map_location=layer.device, weights_only=True)
            layer.load_state_dict(state)
        except FileNotFoundError as error:
            raise ValueError(f"snapshot {snapshot.folder} has no file {path.name} for layer {layer.name}") from error
        except (RuntimeError, EOFError, KeyError, TypeError, ValueError, OSError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise ValueError(f"snapshot file {path} is damaged or of another network: {reason}") from error


def write_manifest(root: Path, *, position: int, steps: int, settings: Mapping[str, Any]) -> None:
    """Declares the snapshot after `steps` complete."""
    content = {"format": _FORMAT, "position": position, "steps": steps, "settings": dict(settings)}
    with _replacing(snapshot_folder(root, steps) / _MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def find_snapshot(root: Path) -> Snapshot:
    """The newest complete snapshot below `root` (or `root` itself, if it is one).

    Raises:
        ValueError: there is none (says where it looked), or its manifest is damaged.
    """
    folders = [root] if (root / _MANIFEST).is_file() else sorted(root.glob("step-*"), reverse=True)
    for folder in folders:
        path = folder / _MANIFEST
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
            return Snapshot(folder, int(content["position"]), int(content["steps"]), content["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"snapshot manifest {path} is damaged: {error}") from error
    raise ValueError(
        f"no complete snapshot below {root}; --resume takes the folder that a run with --snapshot-every wrote"
    )


class _replacing:
    """A temporary file beside `path` that takes its place when everything went well."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix="writing-", suffix=".tmp")
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            os.replace(self._temporary, self._path)
        else:
            self._temporary.unlink(missing_ok=True)


def _file_name(layer: Layer) -> str:
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", layer.name)
    return f"layer-{layer.info.index:03d}-{safe}.pt"
