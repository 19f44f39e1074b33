"""Runs a contender's request in processes of its own, so that its threads, memory and failures are its own too.

Processes are forked from a server that has loaded the libraries and nothing else (where the system forks safely), so
that a run costs what it does and not what importing torch does.
"""

import multiprocessing
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from unlocked.comparison.request import RankAnswer, Request
from unlocked.comparison.worker import work

__all__ = ["ContenderFailed", "Pool"]

_GRACE_SECONDS = 5.0  # for the other processes, once one has failed or all have answered
_PRELOAD = ["torch._dynamo", "torch.distributed.pipelining", "unlocked.comparison.worker"]


class ContenderFailed(Exception):
    """A contender's run failed; the text says why, in one line."""


@dataclass(slots=True)
class _Rank:
    process: BaseProcess
    answer: Connection
    log: Path
    result: RankAnswer | None = None
    reason: str | None = None


class Pool:
    """Starts processes for requests, one request at a time. A context manager."""

    def __init__(self) -> None:
        self._context: BaseContext = multiprocessing.get_context("spawn")
        if sys.platform == "linux":  # macOS's libraries don't survive a fork
            server = multiprocessing.get_context("forkserver")
            server.set_forkserver_preload(_PRELOAD)
            self._context = server
        self._folder = TemporaryDirectory(prefix="compare-")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """For files that the processes share; gone with the pool."""
        return Path(self._folder.name)

    def run(self, request: Request) -> list[RankAnswer]:
        """The answers of all processes, in order of rank.

        Raises:
            ContenderFailed: a process failed, died, or did not answer in time; no process of it is left.
        """
        port = _free_port()
        ranks = [self._start(request, rank, port) for rank in range(request.spec.processes)]
        try:
            _collect(ranks, request.timeout)
        finally:
            for rank in ranks:
                _end(rank)
        answers = [rank.result for rank in ranks if rank.result is not None]
        if len(answers) < len(ranks):
            raise ContenderFailed(_reason(ranks, request.timeout))
        return answers

    def _start(self, request: Request, rank: int, port: int) -> _Rank:
        receiving, sending = self._context.Pipe(duplex=False)
        log = self.folder / f"rank-{rank}.log"
        process = self._context.Process(  # type: ignore[attr-defined]
            target=work, args=(request, rank, port, log, sending), name=f"{request.spec.name}, rank {rank}"
        )
        process.start()
        sending.close()
        return _Rank(process, receiving, log)


def _collect(ranks: list[_Rank], timeout: float) -> None:
    """Takes what arrives until all have answered, or one has failed and the others have had time to say something."""
    deadline = time.monotonic() + timeout
    open_ranks = {rank.answer: rank for rank in ranks}
    while open_ranks and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(open_ranks), left):
            assert isinstance(connection, Connection)
            rank = open_ranks.pop(connection)
            try:
                word, content = connection.recv()
            except EOFError:
                rank.reason = ""  # its process ended without a word
            else:
                if word == "done":
                    rank.result = content
                else:
                    rank.reason = content
            if rank.reason is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)


def _end(rank: _Rank) -> None:
    """A process that has answered may leave by itself; any other has had its time."""
    if rank.result is not None or rank.reason:
        rank.process.join(_GRACE_SECONDS)
    if rank.process.is_alive():
        rank.process.kill()
    rank.process.join()


def _reason(ranks: list[_Rank], timeout: float) -> str:
    """The first cause: what a process said, else what it printed last, else how it ended."""
    spoken = [rank.reason for rank in ranks if rank.reason]
    # A process that lost its neighbour says so; the neighbour knows why.
    spoken.sort(key=lambda text: "onnection" in text or "lost" in text)
    if spoken:
        return spoken[0]
    for number, rank in enumerate(ranks):
        if rank.reason is not None:
            lines = rank.log.read_text(errors="replace").split("\n") if rank.log.exists() else []
            errors = [line for line in lines if line.startswith("error")] or [line for line in lines if line.strip()]
            return f"process {number} ended with code {rank.process.exitcode}" + (f": {errors[-1]}" if errors else "")
    return f"no answer within {timeout:.0f} s"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
