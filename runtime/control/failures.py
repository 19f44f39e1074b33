"""How one worker's failure ends a run: the first cause is kept, and everyone hears of it, this process last."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from unlocked.runtime.control.member import Member
from unlocked.runtime.control.messages import Abort, Failure

__all__ = ["Failures"]

ECHO_GRACE_SECONDS = 0.5
"""How long a failure that looks like another worker's fault waits for that other worker's own story."""
ABORT_SECONDS = 1.0
"""How long the coordinator's own process outlives an abort so that all others hear of it."""


class Failures:
    """Of one run; its methods are called in the coordinator's thread.

    Args:
        everybody: the processes that have said hello so far.
        send: takes a connection's identity and a message; False if the connection is gone.
        changed: notified when there is a first cause.
    """

    def __init__(
        self,
        everybody: Callable[[], Iterable[Member]],
        send: Callable[[bytes, Any], bool],
        changed: threading.Condition,
    ) -> None:
        self._everybody, self._send, self._changed = everybody, send, changed
        self._echo: tuple[str, float] | None = None
        self._waits: set[bytes] = set()  # connections of other processes that have yet to hear of the abort
        self._deadline = math.inf
        self.first: str | None = None
        """The first cause; None while all is well."""

    @property
    def pending(self) -> bool:
        """Something is due within a fraction of a second: call `tick` often."""
        return bool(self._echo or self._waits)

    def fail(self, cause: str) -> None:
        """Records the first cause and tells everyone: the others first, this process last, as it may exit then."""
        if self.first is not None:
            return
        self._echo = None
        with self._changed:
            self.first = cause
            self._changed.notify_all()
        remote = [member for member in self._everybody() if not member.local]
        self._waits = {member.identity for member in remote}
        self._deadline = time.monotonic() + ABORT_SECONDS
        for member in remote:
            if not self._send(member.identity, Abort(message=cause)):
                self._waits.discard(member.identity)
        if not self._waits:
            self._abort_local()

    def reported(self, member: Member, failure: Failure) -> bool:
        """Takes a worker's own report. True if it may be another worker's fault, who should be looked at now."""
        text = f"{member.name} failed in {failure.action} of {failure.layer or 'no layer'}: {failure.message}"
        if self.first is not None:
            self._send(member.identity, Abort(message=self.first))
        elif failure.echo:
            self._echo = self._echo or (text, time.monotonic() + ECHO_GRACE_SECONDS)
            return True
        else:
            self.fail(text)
        return False

    def lost(self, member: Member, why: str) -> None:
        """A worker is gone. That is the cause, unless it has finished or the run is over anyway."""
        if self.first is not None:
            self.told(member)
        elif not member.finished:
            hello = member.hello
            self.fail(
                f"{member.name} is lost after position {member.position}: {why} (pid {hello.pid} on {hello.host})"
            )

    def told(self, member: Member) -> None:
        """This worker knows of the abort, or will never hear of it."""
        if member.identity in self._waits:
            self._waits.discard(member.identity)
            if not self._waits:
                self._abort_local()

    def tick(self, now: float) -> None:
        """What is due at `now` (monotonic seconds)."""
        if self._echo and now >= self._echo[1]:
            self.fail(self._echo[0])
        if self._waits and now >= self._deadline:
            self._waits.clear()
            self._abort_local()

    def _abort_local(self) -> None:
        for member in self._everybody():
            if member.local:
                self._send(member.identity, Abort(message=self.first or ""))
