"""How a process ends before its time: at once and from any thread, since the main one may be inside native code."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

__all__ = ["Verdict", "end_process", "error_line", "forget_acts", "last_act"]

_ACTS_SECONDS = 3.0  # that the last acts may take together
_ends = threading.Lock()
_acts: list[Callable[[str], object]] = []


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a run is over, and with which code its processes leave."""

    message: str
    code: int = 1


@contextlib.contextmanager
def last_act(act: Callable[[str], object]) -> Iterator[None]:
    """While active, `act` is called with the message if the process ends by `end_process`, in a thread of its own: it
    gives back what the kernel would not, such as names in a file system or the terminal's cursor."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def forget_acts() -> None:
    """In a forked child: what is to be given back is its parent's."""
    global _ends
    _ends = threading.Lock()
    _acts.clear()


def end_process(verdict: Verdict, line: str | None) -> NoReturn:
    """Ends this process with its code, after the last acts, the latest first, and one line on standard error.

    Whoever calls second waits for the first one's end.
    """
    if not _ends.acquire(blocking=False):
        while True:
            time.sleep(60)
    acting = threading.Thread(target=_act, args=(verdict.message,), daemon=True)
    acting.start()
    acting.join(_ACTS_SECONDS)
    if line is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody may read it any more
            print(line, file=sys.stderr, flush=True)
    os._exit(verdict.code)


def error_line(rank: int, message: str) -> str:
    """The one line with which a rank's failure is told."""
    text = " ".join(message.split())
    return f"error: {text}" if rank == 0 else f"error [rank {rank}]: {text}"


def _act(message: str) -> None:
    for act in reversed(_acts):
        with contextlib.suppress(Exception):  # the process ends in any case
            act(message)
