"""Starting the workers of a pipeline on this machine, where no launcher has: what torchrun does."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

__all__ = ["start_workers"]

_LOOK_SECONDS = 0.05  # between two looks at who has ended
_PATIENCE, _SHORT_PATIENCE, _HASTE = 30.0, 8.0, 3.0  # see `_patience`
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def start_workers(count: int, module: str, arguments: Sequence[str], *, threads: int) -> int:
    """Runs `python -m module arguments` in `count` processes, on this process's terminal.

    They meet at the loopback address, where alone anything listens. Signals are passed on to them.

    Args:
        threads: intra-op threads of each worker, where OMP_NUM_THREADS says nothing else.

    Returns:
        The exit code: of the worker that failed first, else 0.

    Raises:
        ValueError: they can't meet, or can't be started.
    """
    from unlocked.runtime.engines.processes.local_launch import rank_environments

    with rank_environments(count, threads=threads) as environments, _passing_signals() as started:
        command = [sys.executable, "-m", module, *arguments]
        try:
            for environment in environments:
                started.append(subprocess.Popen(command, env=environment))
        except OSError as error:
            _end(started)
            raise ValueError(f"the {count} processes of the pipeline can't be started: {error}") from error
        return _follow(started)


def _follow(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all of them; the first exit code that is not 0."""
    first, deadline = None, float("inf")
    while None in [process.poll() for process in started]:  # of all: who is not asked does not tell of its end
        first = first or _failed(started)
        if first is not None and deadline == float("inf"):
            deadline = time.monotonic() + _patience(first[1])
        if first is not None and time.monotonic() > deadline:
            _end(started)
            if first[1] > 0:  # of a signal more is said at the end
                _say(f"{_stage(first[0])} left with exit code {first[1]}, and the others did not end by themselves")
            break
        time.sleep(_LOOK_SECONDS)
    for process in started:
        process.wait()
    first = first or _failed(started)
    return 0 if first is None else _exit_code(*first)


def _patience(status: int) -> float:
    """Seconds that the others have to end by themselves once one has left with this return code: in order, where all
    were told to; soon, where it has failed, of which they hear; or at once, where it was killed, of which they may not
    have heard before they all knew each other."""
    if status < 0:
        return _HASTE
    return _PATIENCE if status in [128 + number for number in _PASSED_ON] else _SHORT_PATIENCE


def _failed(started: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Rank and return code of one that did not end well."""
    return next(((rank, process.returncode) for rank, process in enumerate(started) if process.returncode), None)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is None:
            process.kill()


@contextlib.contextmanager
def _passing_signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Inside, signals go to the processes in the list that it gives, and not to this one."""
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_code(rank: int, status: int) -> int:
    """A process's status as a shell tells it: one that a signal ended is 128 + signal."""
    if status < 0:
        _say(f"{_stage(rank)} was ended by {signal.Signals(-status).name}")
        return 128 - status
    return status


def _stage(rank: int) -> str:
    from unlocked.runtime.control.world import stage_name

    return stage_name(rank)


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
