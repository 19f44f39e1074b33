"""Who of this machine's processes lives, from their first line on: a locked file each.

A process takes its lock before it imports torch, and the kernel gives the lock back when it ends, however it ends. So
the others see a death that happens before there is any connection; and a process that leaves on purpose leaves its
reason in the file. Locks are POSIX records: children do not inherit them.
"""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.world import World, attempt, stage_name

__all__ = ["Presence", "lost_in_set_up"]

_SKEW_SECONDS = (
    1.0  # by which processes of one run may take their locks before this one and end: else it is an old file
)
_SWEEP_SECONDS = 3600.0  # after which what killed processes have left is removed
_own: set[int] = set()  # inodes of this process's files: to open and close one again would give its lock back


@dataclass(slots=True)
class _Peer:
    """Another process's file."""

    descriptor: int
    inode: int
    pid: int
    since: float
    """When it took its lock, in seconds of the machine's clock."""
    was_held: bool = False


class Presence:
    """This process's lock, and its view of the others'. Use `join`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._path = folder / f"rank-{rank}"
        self._peers: dict[int, _Peer] = {}
        self._began = _process_start()
        temporary = folder / f".rank-{rank}-{os.getpid()}"
        self._descriptor = os.open(temporary, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)  # until the process ends
        _own.add(os.fstat(self._descriptor).st_ino)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write({"pid": os.getpid(), "since": time.time()})
        os.rename(temporary, self._path)  # nobody sees it before it is locked

    @classmethod
    def join(cls, world: World) -> "Presence | None":
        """Takes this process's lock; None where there is no place for such files.

        Raises:
            ValueError: another process lives that has this rank.
        """
        try:
            base = Path(tempfile.gettempdir()) / f"unlocked-presence-{os.getuid()}"
            base.mkdir(mode=0o700, exist_ok=True)
            if base.is_symlink() or base.stat().st_uid != os.getuid():
                return None
            _sweep(base)
            folder = base / _key(world)
            folder.mkdir(mode=0o700, exist_ok=True)
            _refuse_second(folder / f"rank-{world.rank}", world.rank)
            return cls(folder, world.rank)
        except OSError:
            return None

    def look(self) -> Verdict | None:
        """Why the run is over, if another process of this machine has ended; call it now and then."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob("rank-*"):
                self._meet(path)
        for rank, peer in self._peers.items():
            if _is_held(peer.descriptor):
                peer.was_held = True
            elif peer.was_held or peer.since > self._began - _SKEW_SECONDS:
                return _last_word(peer) or lost_in_set_up(rank, peer.pid)
        return None

    def leave_word(self, verdict: Verdict) -> None:
        """What the others are to say when this process has ended. Only the first word counts."""
        with contextlib.suppress(OSError):
            self._write({"message": verdict.message, "code": verdict.code})

    def settle(self) -> None:
        """Everybody of the run has been here: those who will want to know keep the file open, so that its name may go
        when this process ends."""
        self.look()
        atexit.register(self._remove)

    def _write(self, content: dict[str, object]) -> None:
        os.write(self._descriptor, (json.dumps(content, allow_nan=False) + "\n").encode())

    def _meet(self, path: Path) -> None:
        rank = int(path.name.removeprefix("rank-"))
        known = self._peers.get(rank)
        if path.stat().st_ino in (_own if known is None else {known.inode, *_own}):
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            first = _words(descriptor)[0]
            peer = _Peer(descriptor, os.fstat(descriptor).st_ino, int(first["pid"]), float(first["since"]))
        except (LookupError, ValueError, TypeError):  # nothing of ours
            os.close(descriptor)
            return
        if known is not None:
            os.close(known.descriptor)
        self._peers[rank] = peer

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == os.fstat(self._descriptor).st_ino:
                self._path.unlink()
            self._folder.rmdir()  # the last one can


def lost_in_set_up(rank: int, pid: int | None = None) -> Verdict:
    """What is said of a process that has ended without a word."""
    process = "its process" if pid is None else f"its process ({pid})"
    return Verdict(f"{stage_name(rank)} is lost: {process} ended during set-up")


def _process_start() -> float:
    """When this process began, in seconds of the machine's clock; where the system does not say: now."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # proc(5): starttime
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.time()


def _key(world: World) -> str:
    """What the processes of one attempt at one run have in common, and no others at the same time."""
    network = Path("/proc/self/ns/net")  # containers that share a folder may use the same port
    parts = [
        world.master_address,
        world.master_port,
        world.size,
        os.environ.get("TORCHELASTIC_RUN_ID", ""),
        attempt(),
        os.readlink(network) if network.exists() else "",
    ]
    return "".join(letter if letter.isalnum() else "-" for letter in "-".join(map(str, parts)))[:200]


def _refuse_second(path: Path, rank: int) -> None:
    if path.exists() and path.stat().st_ino not in _own and _lives(path):
        raise ValueError(
            f"rank {rank} of this run is there already; give every process a RANK of its own, and every run a "
            "MASTER_PORT of its own"
        )


def _is_held(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    fcntl.lockf(descriptor, fcntl.LOCK_UN)
    return False


def _words(descriptor: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in os.pread(descriptor, 1 << 16, 0).split(b"\n")[:-1]]


def _last_word(peer: _Peer) -> Verdict | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for word in _words(peer.descriptor)[1:]:
            return Verdict(str(word["message"]), int(word["code"]))
    return None


def _sweep(base: Path) -> None:
    """Removes what runs have left whose processes were all killed."""
    for folder in base.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _SWEEP_SECONDS and not any(map(_lives, folder.iterdir())):
                shutil.rmtree(folder)


def _lives(path: Path) -> bool:
    if path.stat().st_ino in _own:
        return True
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _is_held(descriptor)
    finally:
        os.close(descriptor)
