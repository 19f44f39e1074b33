"""Writing beside the stream: a stage's state is copied into memory that is kept for it, and a thread writes the copy
while the stage goes on.

Memory is bounded: there is one copy of each layer. A stage that comes to its next snapshot before its last one is on
the disk waits for it. What fails in the thread is the failure of the action that began it.
"""

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.runtime.saving.layer_files import LayerFile, layer_file_name, write_layer
from unlocked.runtime.saving.snapshots import reopen_snapshot
from unlocked.workers.errors import StageError
from unlocked.workers.layer import Layer
from unlocked.workers.stage import Stage

__all__ = ["SnapshotWriter"]

_CLOSE_SECONDS = 10.0  # for what is under way when a run fails
_PATIENCE = 4  # timeouts that the disk may take for one layer's file: a large one takes minutes
_Done = Callable[[Mapping[str, LayerFile]], None]


class _Part(NamedTuple):
    """A stage's part of a snapshot."""

    written: "Future[None]"
    stage: Stage
    where: str


class SnapshotWriter:
    """Writes the layers of this process's stages. Use: `save` at every mark, `check` now and then, `finish` at the end,
    `close` in any case.

    Args:
        run: whose layers these are.
        rank: for messages.
        timeout: seconds, of which a wait for the disk lasts `_PATIENCE` times as many after the last file that it took.
    """

    def __init__(self, run: str, *, rank: int = 0, timeout: float = 300.0) -> None:
        self._run, self._rank, self._limit = run, rank, _PATIENCE * timeout
        self._thread: _Thread | None = None
        self._copies: dict[int, Any] = {}  # layer -> the memory of its state
        self._parts: dict[int, _Part] = {}  # stage -> its last one
        self._moved = time.monotonic()  # when the thread began a part, or the disk had taken a file

    def save(self, stage: Stage, folder: Path, position: int, done: _Done, *, epoch: int = 0) -> None:
        """Copies the stage's state as it is now; its files are written to `folder` from then on.

        Args:
            position: the stream position at which a run goes on from here.
            done: is called in the thread, with the files that have reached the disk.
            epoch: for messages.

        Raises:
            StageError: an earlier part of this stage could not be written, or the disk does not answer.
        """
        self._wait(stage.index)
        parts = []
        for layer in stage.layers:
            index = layer.info.index
            self._copies[index] = _copied(layer.state_dict(), self._copies.get(index))
            parts.append((layer, self._copies[index]))
        copied = None
        if stage.layers[0].device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        if self._thread is None:
            self._thread = _Thread()
        where = f"{stage.index}SNAP{position - 1} (epoch {epoch}, the snapshot {folder})"
        written = self._thread.submit(partial(self._write, stage, folder, position, parts, copied, done, where))
        self._parts[stage.index] = _Part(written, stage, where)

    def check(self) -> None:
        """Raises: StageError: a part could not be written."""
        for index, part in tuple(self._parts.items()):
            if part.written.done():
                self._wait(index)

    def finish(self) -> None:
        """Waits until everything is on the disk.

        Raises:
            StageError: a part could not be written, or the disk does not answer.
        """
        for index in tuple(self._parts):
            self._wait(index)

    def close(self) -> None:
        """Ends the thread once it has written what it has; a disk that does not answer is given up. Idempotent."""
        if self._thread is not None:
            wait([part.written for part in self._parts.values()], _CLOSE_SECONDS)
            self._thread.end()
            self._thread = None

    def _wait(self, index: int) -> None:
        part = self._parts.pop(index, None)
        if part is None:
            return
        begun = time.monotonic()
        while not part.written.done():
            left = max(begun, self._moved) + self._limit - time.monotonic()
            if left <= 0:
                cause = TimeoutError(
                    f"the disk has taken no layer's file for {self._limit:g} s ({_PATIENCE} times the timeout); see to "
                    "it, or give another folder for snapshots"
                )
                raise self._failed(part.stage, part.where, cause) from cause
            wait([part.written], left)
        part.written.result()

    def _failed(self, stage: Stage, where: str, cause: Exception) -> StageError:
        layers = ", ".join(stage.layer_names)
        return StageError(rank=self._rank, stage=stage.index, layers=layers, action=where, cause=cause)

    def _write(
        self,
        stage: Stage,
        folder: Path,
        position: int,
        parts: Sequence[tuple[Layer, Mapping[str, Any]]],
        copied: torch.cuda.Event | None,
        done: _Done,
        where: str,
    ) -> None:
        """In the thread."""
        self._moved = time.monotonic()
        try:
            if copied is not None:
                copied.synchronize()
            for layer, state in parts:
                layer.finite.check(state)
            done(self._write_files(folder, position, parts))
        except Exception as error:
            raise self._failed(stage, where, error) from error

    def _write_files(
        self, folder: Path, position: int, parts: Sequence[tuple[Layer, Mapping[str, Any]]]
    ) -> dict[str, LayerFile]:
        """The layers' files; where one can't be written, none of them is left."""
        reopen_snapshot(folder)
        files: dict[str, LayerFile] = {}
        paths: list[Path] = []
        try:
            for layer, state in parts:
                paths.append(folder / layer_file_name(layer.info.index, layer.name))
                files[layer.name] = write_layer(paths[-1], state, run=self._run, position=position, layer=layer.name)
                self._moved = time.monotonic()
        except OSError:
            for path in paths:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other stages' files may be there
                folder.rmdir()
            raise
        return files


class _Thread:
    """Does one thing after the other. A process may end while it hangs in one: those of an executor are waited for."""

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._ended = False
        threading.Thread(target=self._run, name="snapshots", daemon=True).start()

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        future: Future[None] = Future()
        self._due.put((future, work))
        return future

    def end(self) -> None:
        """After what is under way; what has not begun is left undone. Does not wait."""
        self._ended = True
        self._due.put(None)

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            future, work = due
            if self._ended:
                future.cancel()
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)


def _copied(value: Any, memory: Any) -> Any:
    """The value with its tensors in host memory: in that of an earlier copy where it has the same form."""
    if isinstance(value, Tensor):
        value = value.detach()
        fits = isinstance(memory, Tensor) and (memory.shape, memory.dtype) == (value.shape, value.dtype)
        if not fits or memory.stride() != value.stride():
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return memory.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what a module notes beside its state
        for key, item in value.items():
            copied[key] = _copied(item, memory.get(key) if isinstance(memory, dict) else None)
        return copied
    if isinstance(value, list | tuple):
        memories = memory if isinstance(memory, list | tuple) and len(memory) == len(value) else [None] * len(value)
        return type(value)(_copied(item, one) for item, one in zip(value, memories, strict=True))
    return value
