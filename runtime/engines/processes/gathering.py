"""How the final weights of all stages come to rank 0: past the coordinator, which is for short messages.

Of one machine's stages each writes a file, which rank 0 reads and which goes at once; from another machine they come by
a process group of the two. Whether two ranks share a file system is tried. What arrives has the digest of what left.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlocked.runtime.control.messages import RunFailed
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import await_keys
from unlocked.workers.shared_edges import memory_folders

__all__ = ["bring_weights", "gather_weights"]

_PIECE = 32 << 20  # bytes of a message
_BY_FILE, _BY_GROUP = "file", "group"
_LEAVING_SECONDS = 5.0


def gather_weights(
    store: dist.Store, world: World, own: Mapping[str, Tensor], timeout: float, names: Sequence[str]
) -> dict[str, Tensor]:
    """Rank 0's side: all weights, stage by stage.

    Args:
        own: rank 0's.
        timeout: seconds that a rank may take to offer its weights, and that a message may take.
        names: of the stages, for errors.

    Raises:
        RunFailed: a stage's weights did not come, or came damaged; names it.
    """
    found = dict(own)
    for rank in range(1, world.size):
        try:
            found |= _take(dist.PrefixStore(f"weights/{rank}", store), timeout)
        except (RuntimeError, TimeoutError, OSError) as error:
            first = str(error).partition("\n")[0]
            raise RunFailed(f"{names[rank]} is lost: its final weights did not come to rank 0: {first}") from error
    # This process may be the one that serves the store: the others must have read their last word before it ends.
    with contextlib.suppress(RuntimeError, TimeoutError):
        await_keys(store, [f"weights/{rank}/left" for rank in range(1, world.size)], _LEAVING_SECONDS, _pause)
    return found


def bring_weights(store: dist.Store, world: World, own: Mapping[str, Tensor], timeout: float) -> None:
    """The other ranks' side; returns when rank 0 has them.

    Raises:
        RunFailed: rank 0 is gone, or takes longer than `timeout` seconds times the number of ranks.
    """
    store = dist.PrefixStore(f"weights/{world.rank}", store)
    parts = {name: _bytes_of(tensor) for name, tensor in own.items()}
    head = [{"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for n, t in own.items()]
    try:
        with _written(parts) as path:
            offer = {"path": path, "sha256": _digest(parts.values()), "head": head}
            store.set("offer", json.dumps(offer, allow_nan=False))
            await_keys(store, ["how"], timeout * world.size, _pause)
            if store.get("how").decode() == _BY_FILE:
                await_keys(store, ["taken"], timeout, _pause)
        if store.get("how").decode() == _BY_GROUP:
            group = _pair(store, 1, timeout)
            for piece in _pieces(parts.values()):
                group.send([piece], 0, 0).wait(timedelta(seconds=timeout))
            await_keys(store, ["taken"], timeout, _pause)
        store.set("left", "")
    except (RuntimeError, TimeoutError, OSError) as error:
        raise RunFailed(f"rank 0 did not take this stage's final weights: {error}") from error


def _take(store: dist.Store, timeout: float) -> dict[str, Tensor]:
    await_keys(store, ["offer"], timeout, _pause)
    offer = json.loads(store.get("offer"))
    found = {
        entry["name"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"])) for entry in offer["head"]
    }
    parts = [_bytes_of(tensor) for tensor in found.values()]
    if offer["path"] is not None and Path(offer["path"]).exists():
        store.set("how", _BY_FILE)
        with open(offer["path"], "rb", buffering=0) as file:
            for part in _pieces(parts):
                _fill(part, file)
    else:
        store.set("how", _BY_GROUP)
        group = _pair(store, 0, timeout)
        for part in _pieces(parts):
            group.recv([part], 1, 0).wait(timedelta(seconds=timeout))
    store.set("taken", "")
    if _digest(parts) != offer["sha256"]:
        raise RuntimeError("they are not what was sent")
    return found


def _pause(seconds: float) -> None:
    """At the end of a run nobody is busy: the store is asked often."""
    time.sleep(min(seconds, 0.02))


def _pair(store: dist.Store, side: int, timeout: float) -> Any:
    return dist.ProcessGroupGloo(dist.PrefixStore("pair", store), side, 2, timeout=timedelta(seconds=timeout))


def _bytes_of(tensor: Tensor) -> Tensor:
    """Its values as uint8 [bytes]; the same memory where they lie in order on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _pieces(parts: Any) -> Iterator[Tensor]:
    for part in parts:
        yield from part.split(_PIECE) if len(part) else ()


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(parts):
        digest.update(_buffer(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def _written(parts: Mapping[str, Tensor]) -> Iterator[str | None]:
    """The path of a file with all of them, which lasts as long as the block; None: there is no room for it."""
    folder = None
    try:
        for place in _places():
            try:
                folder = tempfile.mkdtemp(prefix="unlocked-", dir=place)
                with open(Path(folder) / "weights", "wb", buffering=0) as file:
                    for piece in _pieces(parts.values()):
                        _put(piece, file)
                break
            except OSError:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                folder = None
        yield None if folder is None else os.path.join(folder, "weights")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _places() -> list[str]:
    """Folders for a file, in memory if there are such; none where there is not even a temporary folder."""
    try:
        return list(dict.fromkeys([*memory_folders(), tempfile.gettempdir()]))
    except OSError:  # no folder that can be written
        return []


def _buffer(piece: Tensor) -> memoryview:
    array: Any = piece.numpy()
    return memoryview(array)


def _put(piece: Tensor, file: Any) -> None:
    view = _buffer(piece)
    while view:
        view = view[file.write(view) :]


def _fill(piece: Tensor, file: Any) -> None:
    view = _buffer(piece)
    while view:
        count = file.readinto(view)
        if not count:
            raise RuntimeError("their file is too short")
        view = view[count:]
