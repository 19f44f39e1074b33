"""Processes of this machine that Python starts by itself, as torchrun would: a rank each, and a store to meet at.

Nothing listens but on the loopback address. Nobody imports the caller's `__main__`, so a script needs no guard.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe
from typing import Any

import torch.distributed as dist

__all__ = ["Started", "start_processes"]

_END_SECONDS = 10.0  # that a process may take to leave once its work is done or it was told to


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
def start_processes(count: int, module: str, *, threads: int) -> Iterator[list[Started]]:
    """Runs `python -m module FD` in `count` processes; FD is the number of the connection's other end.

    They have what torchrun's workers have in their environment, this process's folder, search path and standard
    streams (standard output and error as pipes), and a session of their own: a terminal's Ctrl-C reaches this process
    alone. They end when the block does, and when this process ends, however it ends.

    Args:
        threads: intra-op threads of each, where OMP_NUM_THREADS says nothing else.

    Raises:
        ValueError: this machine lets nobody listen at its loopback address, or start a process.
    """
    started: list[Started] = []
    try:
        listener = socket.create_server(("127.0.0.1", 0), backlog=max(128, count))
        port = listener.getsockname()[1]
        # torch binds its own sockets to every interface; this one is bound already.
        store = dist.TCPStore(
            "127.0.0.1", port, None, True, timedelta(seconds=60), False, master_listen_fd=listener.detach()
        )
        run_id = uuid.uuid4().hex
        for rank in range(count):
            environment = _environment(rank, count, port, run_id, threads)
            started.append(_start(rank, [sys.executable, "-P", "-m", module], environment))
    except (OSError, RuntimeError) as error:
        _end(started)
        raise ValueError(
            f"the {count} processes of the pipeline can't be started here ({error}); use engine 'streams' or "
            "'sequential', which run in this process"
        ) from error
    try:
        yield started
    finally:
        _end(started)
        del store


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


def _environment(rank: int, count: int, port: int, run_id: str, threads: int) -> dict[str, str]:
    own: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        # As torchrun's workers: the parent serves the store, and its end is theirs.
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONUNBUFFERED": 1,
    }
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    defaults = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": loopback}
    return defaults | os.environ | {name: str(value) for name, value in own.items()}


def _end(started: Sequence[Started]) -> None:
    """Whoever still lives had its chance to leave in order."""
    for one in started:
        one.connection.close()
    for one in started:
        if one.process.poll() is None:
            one.tell(signal.SIGTERM)
    for one in started:
        try:
            one.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
        for stream in (one.process.stdout, one.process.stderr):
            if stream is not None:
                stream.close()
