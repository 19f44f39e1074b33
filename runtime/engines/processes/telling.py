"""A worker's failure reaches all others before it leaves the worker."""

import contextlib
from collections.abc import Iterator, Sequence

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.engines.processes.links import SharedRefusal
from unlocked.workers.errors import CalledExitError, LinkLostError, StageError

__all__ = ["COORDINATOR", "telling", "with_stage"]

COORDINATOR = "the coordinator"
"""How the client begins where it misses that."""


@contextlib.contextmanager
def telling(client: CoordinatorClient, names: Sequence[Sequence[str]]) -> Iterator[None]:
    """Whatever fails inside reaches every other worker before it leaves this one.

    Args:
        names: the layers of each stage.

    Raises:
        RunFailed: another worker's failure is behind this one's.
    """
    try:
        yield
    except SharedRefusal:
        raise  # all of them raise it
    except Exception as error:
        first = _tell(client, names, error)
        if first is not None:
            raise RunFailed(first) from error
        raise
    except SystemExit as error:
        called = CalledExitError(error.code)
        _tell(client, names, called)
        raise called from error


def _tell(client: CoordinatorClient, names: Sequence[Sequence[str]], error: Exception) -> str | None:
    """Another worker's failure, if that is behind this one's lost link."""
    if client.failure is not None:
        client.close()  # waits for its thread, which is about to end this process
        return None
    cause = error.cause if isinstance(error, StageError) else error
    is_echo = isinstance(cause, LinkLostError)
    first = client.fail(
        ", ".join(names[client.stage]),
        error.action if isinstance(error, StageError) else "set-up",
        str(cause) or type(cause).__name__,
        echo=is_echo,
    )
    is_own = not is_echo or first.startswith(f"{client.name} failed in ")
    return None if is_own else with_stage(first, names[0])


def with_stage(message: str, first_layers: Sequence[str]) -> str:
    """The coordinator's end is that of the process that it lives in."""
    return f"{stage_name(0, 0, first_layers)} is lost: {message}" if message.startswith(COORDINATOR) else message
