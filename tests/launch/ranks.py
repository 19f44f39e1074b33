"""Real ranks for the tests: processes that are started as a launcher would start them, and never left behind."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from unlocked.comparison.chaos.tree import MARK, Tree

__all__ = [
    "ENVIRONMENT",
    "PIPELINE",
    "children_of",
    "first_error",
    "free_port",
    "let_pass",
    "mark_of",
    "ranks",
    "torchrun",
    "worker_of",
]

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = ROOT / "launch" / "pipeline.py"
_MARKS: dict[int, str] = {}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def first_error(text: str) -> str:
    """The first line with which a process has told why it ended; empty if there is none."""
    return next((line for line in text.splitlines() if line.startswith("error")), "")


def let_pass(seconds: float, started: Sequence[subprocess.Popen[str]]) -> None:
    """A moment of a run, or of its set-up: what the processes have come to by then moves with the machine's load."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)


@contextmanager
def ranks(
    size: int,
    command: Sequence[str],
    *,
    port: int | None = None,
    extra: Mapping[int, Sequence[str]] | None = None,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[list[subprocess.Popen[str]]]:
    """`size` processes with the variables that launchers set; their output is piped.

    Args:
        extra: more flags, by rank.
        prefix: a command that runs the command that follows it, such as a shell's.
        environment: more variables.
        only: the ranks to start; default: all.
    """
    port, extra = port or free_port(), extra or {}
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(port), **(environment or {})}
    started = [
        subprocess.Popen(
            [*prefix, sys.executable, *command, *extra.get(rank, ())],
            env=ENVIRONMENT
            | world
            | dict(environment or {})
            | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(size) if only is None else only)
    ]
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            with suppress(subprocess.TimeoutExpired):  # of somebody whom it has left behind, with its ends of the pipes
                process.communicate(timeout=20)


@contextmanager
def torchrun(
    size: int, command: Sequence[str], *, prefix: Sequence[str] = (), restarts: int = 0
) -> Iterator[subprocess.Popen[str]]:
    """The same under torchrun. `Tree(mark_of(process))` finds all of it: each worker has a session of its own.

    Args:
        restarts: how often it may start them all anew.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    launcher += [f"--max-restarts={restarts}"]
    mark = f"torchrun-{secrets.token_hex(4)}"
    process = subprocess.Popen(
        [*prefix, *launcher, *command],
        env=ENVIRONMENT | {MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _MARKS[process.pid] = mark
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if sys.platform == "linux":
            Tree(mark).end()
        process.communicate()


def mark_of(process: "subprocess.Popen[str]") -> str:
    """Of what `torchrun` has started."""
    return _MARKS[process.pid]


def children_of(pid: int) -> list[int]:
    """Its child processes (Linux)."""
    try:
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def worker_of(supervisor: int) -> int:
    """Waits for the worker: its zygote's child."""
    deadline = time.monotonic() + 60
    while True:
        found = [worker for zygote in children_of(supervisor) for worker in children_of(zygote)]
        if found:
            return found[0]
        assert time.monotonic() < deadline, "no worker came"
        time.sleep(0.01)
