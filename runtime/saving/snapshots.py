"""Snapshots: one file per layer, keyed by the layer's name, so that a run resumes with any number of stages.

A snapshot is a folder `step-NNNNNNNN` below the run's snapshot folder; where a run was stopped behind an evaluation,
`step-NNNNNNNN-evaluated`. Every stage writes its layers' files when it reaches the mark in the stream (upstream stages
are further on by then: nothing waits). When all have, the manifest is written; a folder without one does not count.
Local rules keep no state across layers, so this is the whole run.

Nothing in one can be exchanged for a part of another: the manifest has a checksum of its own and every file's, and the
files name the run and the position that they belong to.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unlocked.runtime.saving.identity import differences
from unlocked.runtime.saving.layer_files import UNREADABLE, LayerFile, damaged, layer_file_name, read_layer
from unlocked.runtime.saving.run_folder import ASIDE
from unlocked.runtime.saving.whole_file import TEMPORARY, folder_reaches_disk, json_text, write_json
from unlocked.workers.errors import NonFiniteWeightsError
from unlocked.workers.layer import Layer

__all__ = [
    "Snapshot",
    "find_snapshot",
    "load_layers",
    "newest_whole",
    "prune_snapshots",
    "reopen_snapshot",
    "set_aside",
    "snapshot_folder",
    "sweep_unfinished",
    "write_manifest",
]

_MANIFEST = "manifest.json"
_CHECKSUM = "sha256"
_FORMAT = 3
_NAME = re.compile(r"step-([0-9]+)(-evaluated)?")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete snapshot.

    Attributes:
        folder: where its files lie.
        run: the run that it is of; a resumed run keeps it.
        position: the stream position at which a resumed run goes on.
        steps: training micro-batches done.
        settings: what must be the same in the resumed run.
        files: layer -> what was written.
        test_losses: (epoch, test loss) of the epochs before, where the learning rate depends on them.
        threads: layer -> intra-op threads of its process.
        generators: where those stood that loaders may draw from, as the run began (`generator_states`).
    """

    folder: Path
    run: str
    position: int
    steps: int
    settings: Mapping[str, Any]
    files: Mapping[str, LayerFile]
    test_losses: tuple[tuple[int, float], ...] = ()
    threads: Mapping[str, int] = field(default_factory=dict)
    generators: Mapping[str, Any] = field(default_factory=dict)

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
        wrong = [f"{name} is {now} but was {then}" for name, now, then in differences(settings, self.settings)]
        if wrong:
            raise ValueError(f"can't resume from {self.folder}: {'; '.join(wrong)}; give the same settings")

    def read(self, index: int, name: str, device: torch.device) -> dict[str, Any]:
        """The state of layer `name`, the network's `index`-th.

        Raises:
            FileNotFoundError: it has no such file.
            ValueError: the file is damaged, or another's (names it and says why).
        """
        path = self.folder / layer_file_name(index, name)
        if name not in self.files:
            raise FileNotFoundError(f"no layer {name}")
        try:
            return read_layer(path, device, written=self.files[name], run=self.run, position=self.position, layer=name)
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            raise ValueError(damaged(path, error)) from error


def snapshot_folder(root: Path, steps: int, *, evaluated: bool = False) -> Path:
    """The folder of the snapshot after `steps` training micro-batches.

    Args:
        evaluated: and after the evaluation that follows them. That is another place of the stream: its snapshot must
            not take the place of the complete one before it.
    """
    return root / f"step-{steps:08d}{'-evaluated' if evaluated else ''}"


def reopen_snapshot(folder: Path) -> None:
    """Makes the folder of a snapshot that is about to be written. What an earlier run has left in it does not count
    from here on: its files are being replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)


def load_layers(snapshot: Snapshot, layers: Iterable[Layer]) -> None:
    """Restores the given layers.

    Raises:
        ValueError: a layer's file is missing, damaged, of another snapshot or of another network (names it), or holds
            weights that are not finite.
    """
    for layer in layers:
        path = snapshot.folder / layer_file_name(layer.info.index, layer.name)
        try:
            state = snapshot.read(layer.info.index, layer.name, layer.device)
        except FileNotFoundError as error:
            missing = f"snapshot {snapshot.folder} has no file {path.name} for layer {layer.name}"
            raise ValueError(missing + _instead_of(snapshot.folder)) from error
        except ValueError as error:
            raise ValueError(f"{error}{_instead_of(snapshot.folder)}") from error
        try:
            layer.load_state_dict(state)
        except UNREADABLE as error:
            raise ValueError(damaged(path, error) + _instead_of(snapshot.folder)) from error
        try:
            layer.finite.check()
        except NonFiniteWeightsError as error:
            raise ValueError(f"can't resume from {snapshot.folder}: {error}") from error


def write_manifest(
    folder: Path,
    *,
    run: str,
    position: int,
    steps: int,
    settings: Mapping[str, Any],
    files: Mapping[str, LayerFile],
    test_losses: Iterable[tuple[int, float]] = (),
    threads: Mapping[str, int] | None = None,
    generators: Mapping[str, Any] | None = None,
) -> None:
    """Declares the snapshot in `folder`, which is after `steps`, complete."""
    content = {
        "format": _FORMAT,
        "run": run,
        "position": position,
        "steps": steps,
        "settings": dict(settings),
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in files.items()},
        "test_losses": list(test_losses),
        "threads": dict(threads or {}),
        "generators": dict(generators or {}),
    }
    content = json.loads(json_text(content))  # as it will be read
    write_json(folder / _MANIFEST, content | {_CHECKSUM: _digest(content)})


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


def set_aside(root: Path, resume: Snapshot | None) -> str | None:
    """Moves the complete snapshots below `root` that a run from `resume` (None: from its start) does not go on from
    into a folder beside them, into which nobody looks by himself. For whoever writes to `root` alone.

    They are another branch's: of a run that was there before, or damaged ones that were passed over.
    By their numbers they would count as newer than the run's own, which would be removed as soon as they are complete,
    and a later start would go on with the branch that was left.

    Returns:
        A line for the user, that says where they are; None: there were none.

    Raises:
        OSError: they can't be moved.
    """
    last: tuple[int, ...] = ()  # the place up to which they are the run's own
    if resume is not None and resume.folder.parent.resolve() == root.resolve():
        last = _place(resume.folder) or (resume.steps, 1)
    others = [folder for folder in _complete(root) if folder != root and _place(folder) > last]
    if not others:
        return None
    number = 1
    while (aside := root / f"{ASIDE}-{number}").exists():
        number += 1
    aside.mkdir()
    for folder in others:
        folder.rename(aside / folder.name)
    for folder in (aside, root):
        folder_reaches_disk(folder)
    names = [folder.name for folder in reversed(others)]
    told = names[0] if len(names) == 1 else f"{len(names)} from {names[0]} to {names[-1]}"
    return f"snapshots in {root} that this run does not go on from ({told}) are set aside in {aside}"


def sweep_unfinished(folder: Path) -> None:
    """Removes what runs that were killed have left half below a run's folder: temporary files and snapshots that were
    not completed. For whoever holds the folder alone."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)
    for path in folder.glob("snapshots/step-*"):
        if _place(path) and path.is_dir() and not (path / _MANIFEST).exists():
            shutil.rmtree(path, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    """The folders with a manifest, the newest first."""
    if (root / _MANIFEST).is_file():
        return [root]
    folders = sorted(filter(_place, root.glob("step-*")), key=_place, reverse=True)
    return [folder for folder in folders if (folder / _MANIFEST).is_file()]


def _read_manifest(folder: Path) -> Snapshot:
    path = folder / _MANIFEST
    try:
        content = json.loads(path.read_text())
        written = content.get("format")
        if written == _FORMAT and content.pop(_CHECKSUM) != _digest(content):
            raise ValueError("its content does not have the checksum that was written with it")
        position, steps, settings = int(content["position"]), int(content["steps"]), dict(content["settings"])
        losses = tuple((int(epoch), float(loss)) for epoch, loss in content.get("test_losses", ()))
        threads = {str(name): int(count) for name, count in content.get("threads", {}).items()}
        generators = dict(content.get("generators", {}))
        files = {
            str(name): LayerFile(int(one["size"]), str(one["sha256"])) for name, one in content.get("files", {}).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"snapshot manifest {path} is damaged: {error}") from error
    if written != _FORMAT:
        raise ValueError(f"snapshot {folder} has format {written}, this release reads {_FORMAT}; start anew")
    return Snapshot(folder, str(content.get("run")), position, steps, settings, files, losses, threads, generators)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(content, sort_keys=True).encode()).hexdigest()


def _check_files(snapshot: Snapshot) -> None:
    """Raises a ValueError that names the first file that is missing or not as it was written."""
    for index, name in enumerate(snapshot.settings.get("layers", ())):
        try:
            snapshot.read(index, name, torch.device("cpu"))
        except FileNotFoundError as error:
            raise ValueError(damaged(snapshot.folder / layer_file_name(index, name), error)) from error


def _instead_of(folder: Path) -> str:
    """What to resume from where a snapshot is damaged."""
    older = [other for other in _complete(folder.parent) if _place(other) < _place(folder)]
    for other in older:
        with contextlib.suppress(ValueError):
            _check_files(_read_manifest(other))
            return f"; the newest whole snapshot before it is {other}: give that, or --resume auto"
    return ""


def _place(folder: Path) -> tuple[int, ...]:
    """Orders snapshots of one run by their names; empty: this is none, but what a user has put there, say."""
    match = _NAME.fullmatch(folder.name)
    return () if match is None else (int(match[1]), int(match[2] is not None))
