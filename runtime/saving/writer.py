"""Writing beside the stream: a stage's state is copied into memory that is kept for it, and a thread writes the copy
while the stage goes on.

Memory is bounded: there is one copy of each layer. A stage that comes to its next snapshot before its last one is on
the disk waits for it. What fails in the thread is the failure of the action that began it.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlocked.runtime.saving.layer_files import LayerFile, layer_file_name, write_layer
from unlocked.runtime.saving.snapshots import reopen_snapshot
from unlocked.workers.errors import StageError
from unlocked.workers.layer import Layer
from unlocked.workers.stage import Stage

__all__ = ["SnapshotWriter"]

_CLOSE_SECONDS = 10.0  # for what is under way when a run fails
_Done = Callable[[Mapping[str, LayerFile]], None]


class SnapshotWriter:
    """Writes the layers of this process's stages. Use: `save` at every mark, `check` now and then, `finish` at the end,
    `close` in any case.

    Args:
        run: whose layers these are.
        rank: for messages.
    """

    def __init__(self, run: str, *, rank: int = 0) -> None:
        self._run, self._rank = run, rank
        self._thread: ThreadPoolExecutor | None = None
        self._copies: dict[int, Any] = {}  # layer -> the memory of its state
        self._written: dict[int, Future[None]] = {}  # stage -> its last part

    def save(self, stage: Stage, folder: Path, position: int, done: _Done, *, epoch: int = 0) -> None:
        """Copies the stage's state as it is now; its files are written to `folder` from then on.

        Args:
            position: the stream position at which a run goes on from here.
            done: is called in the thread, with the files that have reached the disk.
            epoch: for messages.

        Raises:
            StageError: an earlier part of this stage could not be written.
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
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        where = f"{stage.index}SNAP{position - 1} (epoch {epoch}, the snapshot {folder})"
        self._written[stage.index] = self._thread.submit(
            self._write, stage, folder, position, parts, copied, done, where
        )

    def check(self) -> None:
        """Raises: StageError: a part could not be written."""
        for index, written in tuple(self._written.items()):
            if written.done():
                self._wait(index)

    def finish(self) -> None:
        """Waits until everything is on the disk. Raises: StageError: a part could not be written."""
        for index in tuple(self._written):
            self._wait(index)

    def close(self) -> None:
        """Ends the thread once it has written what it has; a disk that does not answer is given up. Idempotent."""
        if self._thread is not None:
            wait(self._written.values(), _CLOSE_SECONDS)
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    def _wait(self, index: int) -> None:
        written = self._written.pop(index, None)
        if written is not None:
            written.result()

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
        try:
            if copied is not None:
                copied.synchronize()
            for layer, state in parts:
                layer.finite.check(state)
            done(self._write_files(folder, position, parts))
        except Exception as error:
            layers = ", ".join(stage.layer_names)
            raise StageError(rank=self._rank, stage=stage.index, layers=layers, action=where, cause=error) from error

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
        except OSError:
            for path in paths:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other stages' files may be there
                folder.rmdir()
            raise
        return files


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
