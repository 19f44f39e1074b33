"""Faults on purpose: a worker of the processes engine that fails just before a stated action of a stated stage.

What a fault is written as: `kill@1SEND17` kills stage 1 before it sends micro-batch 17; `kill@1F15#1` kills the first
incarnation that takes its place, should that come to 1F15, and so on. Several are separated by commas. A run finds
them in the environment (`UNLOCKED_FAULTS`), so that any command line can be put to the test.
"""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from unlocked.workers.actions import Action, ActionKind

__all__ = [
    "FAULTS",
    "VARIABLE",
    "Fault",
    "InjectedError",
    "fail_at",
    "faults_from_environment",
    "parse_faults",
    "trigger",
]

VARIABLE = "UNLOCKED_FAULTS"


class InjectedError(RuntimeError):
    """An exception on purpose: a deterministic failure, as a user's code would raise it."""


def _signalled(number: int) -> Callable[[str], None]:
    return lambda _: os.kill(os.getpid(), number)


def _raise(text: str) -> None:
    raise InjectedError(f"it was told to fail by {text}")


def _exit(_: str) -> None:
    sys.exit(3)


def _vanish(_: str) -> None:
    os._exit(9)


FAULTS: dict[str, Callable[[str], None]] = {
    "kill": _signalled(signal.SIGKILL),
    "stop": _signalled(signal.SIGSTOP),
    "segv": _signalled(signal.SIGSEGV),
    "abort": _signalled(signal.SIGABRT),
    "vanish": _vanish,
    "error": _raise,
    "exit": _exit,
}
"""Name -> what it does to the process that calls it: a death by a signal, a pause (until somebody sends SIGCONT or ends
the process), an end without a word, an exception, or `sys.exit`."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Prints as it is written: `kill@1SEND17`, or `kill@1SEND17#1`.

    Attributes:
        kind: one of `FAULTS`.
        action: what the worker would have done next.
        incarnation: which of the stage's workers it is meant for: 0 is the first.
    """

    kind: str
    action: Action
    incarnation: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@{self.action}" + (f"#{self.incarnation}" if self.incarnation else "")

    def happen(self) -> None:
        """Does it to this process."""
        FAULTS[self.kind](str(self))


def fail_at(stage: int, action: str, position: int, kind: str = "kill", incarnation: int = 0) -> Fault:
    """The fault before `action` (`RECV`, `F`, `U`, `SEND`, `E` or `SNAP`) of a stage, at a stream position.

    Raises:
        ValueError: no such action or kind.
    """
    if action not in list(ActionKind):
        raise ValueError(f"{action!r} is no action; valid: {', '.join(ActionKind)}")
    if kind not in FAULTS:
        raise ValueError(f"{kind!r} is no kind of fault; valid: {', '.join(FAULTS)}")
    return Fault(kind, Action(stage, ActionKind(action), position), incarnation)


def parse_faults(text: str) -> list[Fault]:
    """The faults in a list separated by commas; an empty text has none.

    Raises:
        ValueError: a word that is not a fault.
    """
    faults = []
    for word in filter(None, map(str.strip, text.split(","))):
        match = _FAULT.fullmatch(word)
        if match is None:
            raise ValueError(
                f"{word!r} is not a fault; write kind@action, and #incarnation for a later worker of the stage, such "
                f"as kill@1SEND17 or stop@0F3#1; kinds: {', '.join(FAULTS)}"
            )
        faults.append(Fault(match[1], Action.parse(match[2]), int(match[3] or 0)))
    return faults


def faults_from_environment() -> list[Fault]:
    """Those that this process was started with.

    Raises:
        ValueError: the variable does not hold faults.
    """
    try:
        return parse_faults(os.environ.get(VARIABLE, ""))
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error


def trigger(faults: Iterable[Fault], stage: int, incarnation: int) -> Callable[[Action], None] | None:
    """What a stage's loop calls before each of its actions; None where no fault is meant for this worker."""
    mine = {f.action: f for f in faults if (f.action.stage, f.incarnation) == (stage, incarnation)}

    def before(action: Action) -> None:
        if action in mine:
            mine[action].happen()

    return before if mine else None


_FAULT = re.compile(rf"({'|'.join(FAULTS)})@([^#]+)(?:#([0-9]+))?")
