"""How a worker's failure reaches the caller who started it: as a report of plain data, and as an exception again."""

import traceback
from collections.abc import Sequence

from unlocked.runtime.control.messages import RunFailed
from unlocked.workers.errors import LinkLostError, StageError

__all__ = ["ENDED", "FAILED", "first_cause", "report"]

FAILED, ENDED = "failed", "ended"
_MISTAKE, _FAILURE, _ECHO = "mistake", "failure", "echo"  # in the order in which they are believed


def report(error: BaseException) -> tuple[str, str, str, str | None]:
    """(FAILED, kind, text, trace) of what a worker's run raised."""
    text = str(error) or type(error).__name__
    cause = error.cause if isinstance(error, StageError) else error
    if isinstance(error, ValueError):
        return FAILED, _MISTAKE, text, None
    if isinstance(cause, RunFailed | TimeoutError | LinkLostError | KeyboardInterrupt):
        return FAILED, _ECHO, text, None
    if isinstance(cause, ValueError):
        return FAILED, _FAILURE, text, None
    return FAILED, _FAILURE, text, "".join(traceback.format_exception(error))


def first_cause(
    reports: Sequence[tuple[str, str, str, str | None]], otherwise: str, ends: Sequence[str] = ()
) -> Exception:
    """What the caller raises: a user's mistake as a ValueError, else the failure that is behind the others.

    Args:
        otherwise: what is said where nobody has reported anything.
        ends: how those ended that have reported nothing. Where the others only miss them, that and whatever else was
            said are notes of the error.
    """
    for kind in (_MISTAKE, _FAILURE, _ECHO):
        said = [(text, trace) for _, found, text, trace in reports if found == kind]
        if said:
            text, trace = said[0]
            error: Exception = ValueError(text) if kind == _MISTAKE else RunFailed(text)
            if trace is not None:
                error.add_note(f"The worker's own traceback:\n{trace}")
            others = dict.fromkeys((*ends, *(other for other, _ in said if other != text)))
            for other in others if kind == _ECHO else ():
                error.add_note(other)
            return error
    return RunFailed(otherwise)
