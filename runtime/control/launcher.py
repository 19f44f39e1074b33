"""The launcher's death is its workers' death: nobody else would ever end them."""

import os
import select
import threading

from unlocked.runtime.control.ending import Verdict, end_process, error_line
from unlocked.runtime.control.world import launched_by_torchrun

__all__ = ["LAUNCHER", "follow_launcher"]

LAUNCHER = "UNLOCKED_LAUNCHER"
"""The variable by which our own launcher tells its number: a process that lost it before it ran any code of ours would
take its new parent for the launcher, meet the others of its kind and train without an end."""

_POLL_SECONDS = 0.5
_told = os.environ.pop(LAUNCHER, "")  # not for processes that this one starts
_PARENT = int(_told) if _told.isdecimal() else os.getppid()  # as early as this process runs any code of ours
_follows = threading.Lock()


def follow_launcher(rank: int) -> None:
    """From now on this process ends within a second of torchrun's agent. Idempotent; under other launchers (a shell
    that is closed, for one) the parent's end means nothing.

    A thread waits for it and not the kernel (PR_SET_PDEATHSIG), which would act as well when merely the thread that
    started this process ends.
    """
    if launched_by_torchrun() and _follows.acquire(blocking=False):
        threading.Thread(target=_follow, args=(rank,), name="launcher-watch", daemon=True).start()


def _follow(rank: int) -> None:
    # Whose agent was gone at its start, under torchrun, finds no store at MASTER_ADDR:MASTER_PORT.
    try:
        handle = os.pidfd_open(_PARENT)
    except (AttributeError, OSError):  # not Linux, an old kernel, or gone: the parent's number tells
        handle = None
    poll = select.poll()
    if handle is not None:
        poll.register(handle, select.POLLIN)
    while os.getppid() == _PARENT:
        poll.poll(1000 * _POLL_SECONDS)
    message = f"the launcher (process {_PARENT}) is gone, and its workers end with it"
    end_process(Verdict(message), error_line(rank, message))
