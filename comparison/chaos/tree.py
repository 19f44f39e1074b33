"""The processes of one disturbed run, whoever started them: all that carry its mark in their environment (Linux)."""

import contextlib
import ctypes
import os
import random
import signal
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Process", "Tree", "cut_connection"]

MARK = "UNLOCKED_CHAOS"
"""The variable that marks a run's processes."""

_GETFD = 438  # the number of pidfd_getfd on every architecture that has it
_POLL = 0.02
_LAST_SECONDS = 10.0  # that killed processes may take to be gone


@dataclass(frozen=True, slots=True)
class Process:
    """One of the run's processes. `rank`: of the stage that it works for; None: it launches the others."""

    pid: int
    parent: int
    rank: int | None

    @property
    def state(self) -> str:
        """The kernel's letter for what it does; empty: it has ended."""
        fields = _stat(self.pid)
        return fields[0] if fields else ""

    @property
    def is_alive(self) -> bool:
        return self.state not in ("", "Z", "X")

    def send(self, number: int) -> bool:
        """Whether it was there to take the signal."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


class Tree:
    """Finds the processes of the run that is marked by `mark`."""

    def __init__(self, mark: str) -> None:
        self._told = f"{MARK}={mark}".encode()

    def processes(self) -> list[Process]:
        """All of them, by their numbers."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, ValueError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                fields = _stat(int(entry.name))
                if self._told not in variables or not fields or fields[0] in "ZX":
                    continue
                if b"resource_tracker" in (entry / "cmdline").read_bytes():
                    continue  # of Python's own: it ends when all others have
                rank = next((int(one[5:]) for one in variables if one.startswith(b"RANK=")), None)
                found.append(Process(int(entry.name), int(fields[1]), rank))
        return sorted(found, key=lambda one: one.pid)

    def workers(self) -> dict[int, Process]:
        """The process of each rank that runs its stage: of a supervisor and its child, the child."""
        found: dict[int, Process] = {}
        everything = self.processes()
        parents = {one.parent for one in everything if one.rank is not None}
        for one in everything:
            if one.rank is not None and (one.pid not in parents or one.rank not in found):
                found[one.rank] = one
        return found

    def heads(self) -> dict[int, Process]:
        """The process of each rank that was started by the launcher."""
        found: dict[int, Process] = {}
        for one in self.processes():
            if one.rank is not None:
                found.setdefault(one.rank, one)
        return found

    def stacks(self) -> list[str]:
        """What every process is about, and how busy the machine is: for a run that stands still."""
        told = [f"{path.name}: {_line(path)}" for path in sorted(Path("/proc/pressure").glob("*"))]
        for one in self.processes():
            waits = _line(Path(f"/proc/{one.pid}/wchan"))
            told.append(f"process {one.pid} of {one.parent}, rank {one.rank}: {one.state} {waits}")
        return told

    def end(self) -> int:
        """Kills whatever is left, and what it starts meanwhile, and waits for that; how many there were."""
        left = others = self.processes()
        deadline = time.monotonic() + _LAST_SECONDS
        while others and time.monotonic() < deadline:
            for one in others:
                one.send(signal.SIGKILL)
            time.sleep(_POLL)
            others = self.processes()
        return len(left)

    def is_gone(self, seconds: float) -> bool:
        """Whether all of them have ended by then."""
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True


def cut_connection(process: Process, chance: random.Random, port: int | None = None) -> bool:
    """Shuts one of the process's TCP connections down, as a broken link does: with `port`, one to that port. False: it
    has none.

    Raises:
        OSError: the system does not let this process do it.
    """
    handle = os.pidfd_open(process.pid)
    call = ctypes.CDLL(None, use_errno=True).syscall
    try:
        numbers = [int(name) for name in os.listdir(f"/proc/{process.pid}/fd")]
        chance.shuffle(numbers)
        for number in numbers:
            with contextlib.suppress(OSError):
                if not stat.S_ISSOCK(os.stat(f"/proc/{process.pid}/fd/{number}").st_mode):
                    continue
                own = call(_GETFD, handle, number, 0)
                if own < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                with socket.socket(fileno=own) as taken:
                    if taken.family in (socket.AF_INET, socket.AF_INET6) and taken.type == socket.SOCK_STREAM:
                        peer = taken.getpeername()  # raises where it only listens
                        if port is not None and peer[1] != port:
                            continue
                        taken.shutdown(socket.SHUT_RDWR)
                        return True
    finally:
        os.close(handle)
    return False


def _line(path: Path) -> str:
    """The first line of a file of the kernel's; empty where it may not be read."""
    with contextlib.suppress(OSError):
        return path.read_text().partition("\n")[0]
    return ""


def _stat(pid: int) -> list[str]:
    """State and parent of a process, as the kernel writes them; empty: there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()[:2]
