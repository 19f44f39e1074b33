"""Decoded images on disk: one array of bytes per split, mapped into memory, made once and by one process.

The array's name holds a fingerprint of everything that it was made from (every file's path, size and time of change,
and how it was decoded), so that a change makes a new one, and the old one is removed. It grows under a temporary name
and is renamed when it is whole.
"""

import hashlib
import json
import os
import secrets
import selectors
import subprocess
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from unlocked.data import decode
from unlocked.data.cores import usable_cores
from unlocked.data.dataset import count_statistics
from unlocked.data.download import only_one

__all__ = ["CachedImages", "ImageFiles", "cached_images"]

_FORMAT = 2  # of the decoded values: another number makes them anew
_FILES_PER_WORKER = 200  # fewer are decoded in the time that a further process takes to start
_STATISTICS_ROWS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFiles:
    """The files of one split and how they are decoded."""

    name: str
    """Of the array: letters, digits, - and _."""
    root: Path
    paths: Sequence[str]
    """Below `root`, in the order of the samples."""
    channels: int
    height: int
    width: int
    resize: int | None
    """Scale the shorter side to this, then cut height x width out of the middle. None: files have that size."""
    example: str
    """The file that height and width come from, for messages."""


@dataclass(frozen=True, slots=True)
class CachedImages:
    """uint8 [N, C, H, W], mapped from a file that is never written again; and what was added up when it was made."""

    images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def cached_images(files: ImageFiles, cache_dir: Path, *, workers: int | None = None) -> CachedImages:
    """The images, decoded now or earlier. Processes that ask at the same time wait for one of them to do the work.

    Args:
        workers: processes that decode; None: one per CPU, as far as there are files enough.

    Raises:
        ValueError: a file is missing, can't be read or has another size; or `cache_dir` can't be written.
    """
    stem = f"{files.name}-{_fingerprint(files)}"
    path = cache_dir / f"{stem}.npy"
    if not path.is_file():
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with only_one(cache_dir / f".{files.name}.lock"):
                if not path.is_file():
                    _make(files, path, workers)
                    _remove_others(cache_dir, files.name, stem)
        except OSError as error:
            raise ValueError(
                f"decoded images can't be kept in {cache_dir} ({error}); make room there, or give another cache_dir"
            ) from error
    return _open(path, files)


def _make(files: ImageFiles, path: Path, workers: int | None) -> None:
    shape = (len(files.paths), files.channels, files.height, files.width)
    part = path.with_name(f".{files.name}-{secrets.token_hex(8)}.npy")  # no other process writes to this one
    try:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(part)
        count = workers or min(usable_cores(), -(-len(files.paths) // _FILES_PER_WORKER))
        paths = [str(files.root / one) for one in files.paths]
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as progress:
            task = progress.add_task(f"decoding {files.name}", total=len(paths))
            if count == 1:
                decode.decode_into(
                    array,
                    list(range(len(paths))),
                    paths,
                    resize=files.resize,
                    example=files.example,
                    report=lambda done: progress.update(task, completed=done),
                )
            else:
                _decode_in_processes(part, files, paths, count, lambda done: progress.update(task, completed=done))
        array.flush()
        mean, std = _statistics(array)
        path.with_suffix(".json").write_text(json.dumps({"mean": mean, "std": std}))
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _decode_in_processes(part: Path, files: ImageFiles, paths: list[str], count: int, report: Any) -> None:
    """Every worker decodes every `count`-th file straight into the array."""
    started: list[subprocess.Popen[str]] = []
    done = [0] * count
    try:
        with selectors.DefaultSelector() as selector:
            for i in range(count):
                # -P: the folder of the program is not searched for modules.
                process = subprocess.Popen(
                    [sys.executable, "-P", decode.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                started.append(process)
                rows = list(range(i, len(paths), count))
                task = {"array": str(part), "rows": rows, "paths": paths[i::count], "resize": files.resize}
                assert process.stdin is not None
                assert process.stdout is not None
                task |= {"example": files.example, "pixel_limit": decode.pixel_limit()}
                with suppress(BrokenPipeError), process.stdin:  # one that died at once is met below
                    json.dump(task, process.stdin)
                selector.register(process.stdout, selectors.EVENT_READ, i)
            while selector.get_map():
                for key, _ in selector.select():
                    line = started[key.data].stdout.readline()
                    if not line:
                        selector.unregister(key.fileobj)
                        if code := started[key.data].wait():
                            raise ValueError(f"a process that decodes images ended with code {code}; is memory short?")
                        continue
                    message = json.loads(line)
                    if "error" in message:
                        raise ValueError(message["error"])
                    done[key.data] = message["done"]
                    report(sum(done))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _open(path: Path, files: ImageFiles) -> CachedImages:
    expected = (len(files.paths), files.channels, files.height, files.width)
    advice = "remove it to have it made again"
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        content = json.loads(path.with_suffix(".json").read_text())
        mean, std = tuple(content["mean"]), tuple(content["std"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"decoded images {path} are damaged ({error}); {advice}") from error
    if array.shape != expected or array.dtype != np.uint8:
        found = f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"decoded images {path} hold {found}, expected uint8 {list(expected)}; {advice}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nobody writes
        return CachedImages(torch.from_numpy(array), mean, std)


def _reserve(path: Path) -> None:
    """Takes the disk space now: writing to a mapped file when there is none left would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _statistics(array: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts = np.zeros((array.shape[1], 256), dtype=np.int64)
    for start in range(0, len(array), _STATISTICS_ROWS):
        part = array[start : start + _STATISTICS_ROWS]
        for channel in range(array.shape[1]):
            counts[channel] += np.bincount(part[:, channel].reshape(-1), minlength=256)
    return count_statistics(torch.from_numpy(counts))


def _fingerprint(files: ImageFiles) -> str:
    digest = hashlib.sha256()
    how = [_FORMAT, files.channels, files.height, files.width, files.resize, decode.pillow_version()]
    digest.update(json.dumps(how).encode())
    for path in files.paths:
        try:
            status = (files.root / path).stat()
        except OSError as error:
            raise ValueError(f"image {files.root / path} can't be read: {error.strerror}") from error
        if kind := decode.kind_of_file(status.st_mode):
            raise ValueError(f"image {files.root / path} can't be read: it is {kind}, no regular file")
        digest.update(f"\n{path}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]


def _remove_others(cache_dir: Path, name: str, stem: str) -> None:
    """Arrays of files as they were before, and what a killed process left. Whoever has one mapped keeps it."""
    for old in (*cache_dir.glob(f"{name}-*"), *cache_dir.glob(f".{name}-*.npy")):
        if old.stem != stem:
            old.unlink(missing_ok=True)
