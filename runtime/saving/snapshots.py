"""Snapshots: one file per layer, keyed by the layer's name, so that a run resumes with any number of stages.

A snapshot is a folder `step-NNNNNNNN` below the run's snapshot folder. Every stage writes its layers' files when it
reaches the mark in the stream (upstream stages are further on by then: nothing waits). When all have, the manifest is
written; a folder without one does not count. Local rules keep no state across layers, so this is the whole run.
"""

import contextlib
import hashlib
import json
import pickle
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.result import tensor_bytes
from unlocked.runtime.saving.whole_file import TEMPORARY, whole_file, write_json
from unlocked.workers.errors import NonFiniteWeightsError
from unlocked.workers.layer import Layer

__all__ = [
    "UNREADABLE",
    "Snapshot",
    "damaged",
    "find_snapshot",
    "layer_file_name",
    "load_layers",
    "newest_whole",
    "prune_snapshots",
    "read_layer",
    "save_layers",
    "snapshot_folder",
    "state_digest",
    "sweep_unfinished",
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
_ONCE: Mapping[str, Any] = {"drop_last": False, "output_rule": "CrossEntropy", "clip_grad_norm": None}
"""What holds where a snapshot does not say: an earlier release had no such setting."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot.

    Attributes:
        folder: where its files lie.
        position: the stream position at which a resumed run goes on.
        steps: training micro-batches done.
        settings: what must be the same in the resumed run.
        test_losses: (epoch, test loss) of the epochs before, where the learning rate depends on them.
        threads: layer -> intra-op threads of its process; empty: an earlier release did not say.
    """

    folder: Path
    position: int
    steps: int
    settings: Mapping[str, Any]
    test_losses: tuple[tuple[int, float], ...] = ()
    threads: Mapping[str, int] = field(default_factory=dict)

    def other_threads(self, threads: Mapping[str, int]) -> str | None:
        """What a user must know where layers have other numbers of threads now; None: they are the same."""
        changed: dict[tuple[int, int], list[str]] = {}
        for name, now in threads.items():
            if (then := self.threads.get(name, now)) != now:
                changed.setdefault((then, now), []).append(name)
        if not changed:
            return None
        pairs = [
            f"{now} threads where there were {then} ({', '.join(names)})" for (then, now), names in changed.items()
        ]
        return (
            f"the run that wrote {self.folder} is resumed with {'; '.join(pairs)}: the last bits of its weights may "
            "differ; --threads sets the number"
        )

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises a ValueError that lists every setting which differs from the run that wrote the snapshot."""
        wrong = [
            f"{name} is {settings.get(name)!r} but was {value!r}"
            for name, value in {**_ONCE, **self.settings}.items()
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

    Raises:
        NonFiniteWeightsError: there is nothing to go on from. What was saved before stays.
        DiskFullError: there is no room for a file (names it); none of these layers' files is left then.
    """
    layers = list(layers)
    for layer in layers:
        layer.check_weights()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)
    written: list[Path] = []
    try:
        for layer in layers:
            path = folder / layer_file_name(layer.info.index, layer.name)
            written.append(path)
            with whole_file(path) as temporary:
                state = layer.state_dict()
                torch.save({**state, _CHECKSUM: state_digest(state)}, temporary)
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other stages' files may be there
            folder.rmdir()
        raise


def load_layers(snapshot: Snapshot, layers: Iterable[Layer]) -> None:
    """Restores the given layers.

    Raises:
        ValueError: a layer's file is missing, damaged or of another network (names it), or holds weights that are not
            finite.
    """
    for layer in layers:
        path = snapshot.folder / layer_file_name(layer.info.index, layer.name)
        try:
            layer.load_state_dict(read_layer(path, layer.device))
        except FileNotFoundError as error:
            missing = f"snapshot {snapshot.folder} has no file {path.name} for layer {layer.name}"
            raise ValueError(missing + _instead_of(snapshot.folder)) from error
        except UNREADABLE as error:
            raise ValueError(damaged(path, error) + _instead_of(snapshot.folder)) from error
        try:
            layer.check_weights()
        except NonFiniteWeightsError as error:
            raise ValueError(f"can't resume from {snapshot.folder}: {error}") from error


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
    threads: Mapping[str, int] | None = None,
) -> None:
    """Declares the snapshot after `steps` complete."""
    content = {
        "format": _FORMAT,
        "position": position,
        "steps": steps,
        "settings": dict(settings),
        "test_losses": list(test_losses),
        "threads": dict(threads or {}),
    }
    write_json(snapshot_folder(root, steps) / _MANIFEST, content)


def find_snapshot(root: Path) -> Snapshot:
    """The newest complete snapshot below `root` (or `root` itself, if it is one).

    Raises:
        ValueError: there is none (says where it looked), or its manifest is damaged (names the newest whole one).
    """
    for folder in _complete(root):
        try:
            return _read_manifest(folder)
        except ValueError as error:
            raise ValueError(f"{error}{_instead_of(folder)}") from error
    raise ValueError(
        f"no complete snapshot below {root}; --resume takes the folder that a run with --snapshot-every wrote"
    )


def newest_whole(root: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot below `root` of which every byte is as it was written, and what is wrong with newer ones.

    None: there is no complete snapshot at all.

    Raises:
        ValueError: there are some, all damaged.
    """
    problems: list[str] = []
    for folder in _complete(root):
        try:
            snapshot = _read_manifest(folder)
            _check_files(snapshot)
            return snapshot, problems
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(f"no snapshot below {root} is whole: {problems[0]}; remove them to start anew")
    return None, []


def prune_snapshots(root: Path, keep: int) -> None:
    """Removes all complete snapshots but the newest `keep`."""
    for folder in _complete(root)[keep:]:
        (folder / _MANIFEST).unlink(missing_ok=True)  # first, so that it never counts with files missing
        shutil.rmtree(folder, ignore_errors=True)


def sweep_unfinished(folder: Path) -> None:
    """Removes what runs that were killed have left half below a run's folder: temporary files and snapshots that were
    not completed. For whoever holds the folder alone."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    for path in folder.glob("snapshots/step-*"):
        if path.is_dir() and not (path / _MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    """The folders with a manifest, the newest first."""
    folders = [root] if (root / _MANIFEST).is_file() else sorted(root.glob("step-*"), key=_by_number, reverse=True)
    return [folder for folder in folders if (folder / _MANIFEST).is_file()]


def _read_manifest(folder: Path) -> Snapshot:
    path = folder / _MANIFEST
    try:
        content = json.loads(path.read_text())
        position, steps, settings = int(content["position"]), int(content["steps"]), dict(content["settings"])
        losses = tuple((int(epoch), float(loss)) for epoch, loss in content.get("test_losses", ()))
        threads = {str(name): int(count) for name, count in content.get("threads", {}).items()}
        written = content.get("format")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"snapshot manifest {path} is damaged: {error}") from error
    if written != _FORMAT:
        raise ValueError(f"snapshot {folder} has format {written}, this release reads {_FORMAT}; start anew")
    return Snapshot(folder, position, steps, settings, losses, threads)


def _check_files(snapshot: Snapshot) -> None:
    """Raises a ValueError that names the first file that is missing or not as it was written."""
    for index, name in enumerate(snapshot.settings.get("layers", ())):
        path = snapshot.folder / layer_file_name(index, name)
        try:
            read_layer(path, torch.device("cpu"))
        except UNREADABLE as error:
            raise ValueError(damaged(path, error)) from error


def _instead_of(folder: Path) -> str:
    """What to resume from where a snapshot is damaged."""
    older = [other for other in _complete(folder.parent) if _by_number(other) < _by_number(folder)]
    for other in older:
        with contextlib.suppress(ValueError):
            _check_files(_read_manifest(other))
            return f"; the newest whole snapshot before it is {other}: give that, or --resume auto"
    return ""


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
