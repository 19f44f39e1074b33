"""The kinds of faults: what is done to a run's processes, and how their last words must name it."""

import contextlib
import os
import random
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unlocked.comparison.chaos.tree import Process, Tree, cut_connection

__all__ = ["KINDS", "TYPED", "Blow", "Kind"]

_STAGE = r"stage {rank} \(rank {rank}"
_ANY_STAGE = r"stage \d+ \(rank \d+"
_FILE_LIMIT = 4096  # bytes that a file may have where the disk is to fail


@dataclass(frozen=True, slots=True)
class Blow:
    """What a fault has hit.

    Attributes:
        rank: the stage's; None: it was none alone.
        pids: processes that stand still because of it, to be ended with the run.
    """

    rank: int | None
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        about: in a few words.
        strike: does it; None: there was nothing to do it to (yet).
        words: what the first error line must match, `{rank}` being the victim's; empty: it needs no word.
        ends: whether somebody must notice; else the run may go on as if nothing were.
    """

    about: str
    strike: Callable[[Tree, Path, random.Random], Blow | None]
    words: str
    ends: bool = True


def _signalled(number: int, ranks: Callable[[Tree], dict[int, Process]] = Tree.workers) -> Callable[..., Blow | None]:
    def strike(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
        found = ranks(tree)
        if not found:
            return None
        rank = chance.choice(sorted(found))
        if not found[rank].send(number):
            return None
        return Blow(rank, (found[rank].pid,) if number == signal.SIGSTOP else ())

    return strike


def _coordinator(tree: Tree) -> dict[int, Process]:
    return {rank: one for rank, one in tree.heads().items() if rank == 0}


def _launcher(number: int) -> Callable[..., Blow | None]:
    def strike(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
        found = [one for one in tree.processes() if one.rank is None]
        if not found or (number == signal.SIGKILL and not tree.workers()):
            return None  # before it has any, nobody could say that it is gone
        return Blow(None) if found[0].send(number) else None

    return strike


def _cut_link(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
    found = tree.workers()
    if not found:
        return None
    rank = chance.choice(sorted(found))
    with contextlib.suppress(OSError):  # it has just ended
        return Blow(rank) if cut_connection(found[rank], chance) else None
    return None


def _fail_disk(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
    """From now on no process of the run can write more than a page to a file: as on a full disk."""
    found = tree.workers()
    for one in found.values():
        with contextlib.suppress(OSError):
            resource.prlimit(one.pid, resource.RLIMIT_FSIZE, (_FILE_LIMIT, _FILE_LIMIT))
    return Blow(None) if found else None


def _take_descriptors(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
    """From now on a process can open nothing more."""
    found = tree.workers()
    if not found:
        return None
    rank = chance.choice(sorted(found))
    with contextlib.suppress(OSError):
        taken = max(map(int, os.listdir(f"/proc/{found[rank].pid}/fd")))
        resource.prlimit(found[rank].pid, resource.RLIMIT_NOFILE, (taken + 1, taken + 1))
        return Blow(rank)
    return None


def _damage(tree: Tree, folder: Path, chance: random.Random) -> Blow | None:
    """A bit of the newest snapshot that is complete turns, and a worker dies."""
    complete = sorted(folder.glob("snapshots/step-*/manifest.json"))
    if len(complete) < 2:
        return None  # else the run would rightly refuse to go on
    path = chance.choice(sorted(complete[-1].parent.iterdir()))
    with contextlib.suppress(OSError):  # a run prunes its snapshots
        content = bytearray(path.read_bytes())
        if not content:  # one that somebody is just writing
            return None
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        return _signalled(signal.SIGKILL)(tree, folder, chance)
    return None


KINDS: dict[str, Kind] = {
    "kill": Kind("a worker is killed (SIGKILL), as for want of memory", _signalled(signal.SIGKILL), _STAGE),
    "segv": Kind("a worker breaks (SIGSEGV)", _signalled(signal.SIGSEGV), _STAGE),
    "abort": Kind("a library gives up in a worker (SIGABRT)", _signalled(signal.SIGABRT), _STAGE),
    "stop": Kind("a worker stands still for good (SIGSTOP)", _signalled(signal.SIGSTOP), _STAGE),
    "coordinator": Kind("the process with the coordinator is killed", _signalled(signal.SIGKILL, _coordinator), _STAGE),
    "launcher": Kind("the launcher is killed", _launcher(signal.SIGKILL), r"launcher|" + _ANY_STAGE),
    "preempt": Kind("the run is told to leave (SIGTERM)", _launcher(signal.SIGTERM), ""),
    "link": Kind("a connection of a worker is cut", _cut_link, _ANY_STAGE, ends=False),
    "disk": Kind("no file can grow any more", _fail_disk, r"File too large|disk|can't be written|writing", ends=False),
    "descriptors": Kind("a worker can open nothing more", _take_descriptors, _ANY_STAGE, ends=False),
    "damage": Kind("the newest snapshot is damaged, then a worker killed", _damage, _STAGE),
}
"""Name -> kind, of those that come at any moment."""

TYPED = ("kill", "segv", "abort", "stop")
"""Those that also come at a stated action, see `unlocked.runtime.faults`."""
