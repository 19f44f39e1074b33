"""Processes of this machine that Python starts by itself, as torchrun would: a rank each, and a folder to meet in.

They need no port: store, coordinator and edges are files and sockets in folders of the user's. Nobody imports the
caller's `__main__`, so a script needs no guard.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

from unlocked.runtime.control.launcher import LAUNCHER
from unlocked.runtime.engines.processes.rendezvous import MEETING

__all__ = ["Started", "rank_environments", "start_processes"]

_NO_PORT = 1  # nobody looks for anything there
_LONGEST_PLACE = 73  # bytes: macOS allows 103 for a socket's path, and below it is /unlocked-12345678/coordinator
_END_SECONDS = 5.0  # that all of them may take to leave once their work is done or they were told to


@dataclass(frozen=True, slots=True, eq=False)
class Started:
    """One of the processes, and this process's end of a connection to it."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    def tell(self, number: int) -> None:
        """Sends it a signal, if it lives."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)


@contextlib.contextmanager
def rank_environments(count: int, *, threads: int) -> Iterator[list[dict[str, str]]]:
    """The environment of each of `count` processes, which find each other while the block lasts.

    They have what torchrun's workers have there, and a folder of this process's: below the temporary folder, or below
    /tmp where that one's path is too long for a socket's.

    Args:
        threads: intra-op threads of each, where OMP_NUM_THREADS says nothing else.

    Raises:
        ValueError: there is no place for such a folder.
    """
    place = "a temporary folder"
    try:
        place = tempfile.gettempdir()
        if len(os.fsencode(place)) > _LONGEST_PLACE:
            place = "/tmp"
        folder = tempfile.mkdtemp(prefix="unlocked-", dir=place)  # mode 0700
    except OSError as error:
        raise ValueError(
            f"the {count} processes of the pipeline would meet in a folder below {place}, but none can be made there "
            f"({error.strerror}); set TMPDIR to a folder that can be written, with a path of at most {_LONGEST_PLACE} "
            "bytes"
        ) from error
    run_id = uuid.uuid4().hex
    try:
        yield [_environment(rank, count, folder, run_id, threads) for rank in range(count)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def start_processes(count: int, module: str, *, threads: int) -> Iterator[list[Started]]:
    """Runs `python -m module FD` in `count` processes; FD is the number of the connection's other end.

    They have this process's folder and search path, pipes for standard output and error, and a session of their own: a
    terminal's Ctrl-C reaches this process alone. They end when the block does, and when this process ends, however it
    ends.

    Args:
        threads: as for `rank_environments`.

    Raises:
        ValueError: as `rank_environments`; or no more processes can be started.
    """
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    started: list[Started] = []
    with rank_environments(count, threads=threads) as environments:
        try:
            for rank, environment in enumerate(environments):
                environment |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
                started.append(_start(rank, [sys.executable, "-P", "-m", module], environment))
            yield started
        except BlockingIOError as error:  # fork's, where there are too many processes
            raise ValueError(f"the {count} processes of the pipeline can't be started: {error}") from error
        finally:
            _end(started)


def _start(rank: int, command: Sequence[str], environment: dict[str, str]) -> Started:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    return Started(rank, process, ours)


def _environment(rank: int, count: int, folder: str, run_id: str, threads: int) -> dict[str, str]:
    own: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _NO_PORT,
        MEETING: folder,
        LAUNCHER: os.getpid(),
        # As torchrun's workers: the parent's end is theirs.
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
    return {"OMP_NUM_THREADS": str(threads)} | inherited | {name: str(value) for name, value in own.items()}


def _end(started: Sequence[Started]) -> None:
    """Whoever still lives had its chance to leave in order."""
    for one in started:
        one.connection.close()
    for one in started:
        if one.process.poll() is None:
            one.tell(signal.SIGTERM)
    deadline = time.monotonic() + _END_SECONDS
    for one in started:
        try:
            one.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        for stream in (one.process.stdout, one.process.stderr):
            if stream is not None:
                stream.close()
