"""Who of a run still lives, as the coordinator sees it: by connections and by signs of life."""

from collections.abc import Callable
from typing import Any

from unlocked.runtime.control.failures import Failures
from unlocked.runtime.control.member import Roster
from unlocked.runtime.control.messages import Beat, Hello
from unlocked.runtime.control.recoveries import Recoveries

__all__ = ["Pulse"]

PING_SECONDS = 0.25
"""Every ping tells the workers that the coordinator lives, and finds out whose connection is gone."""
MOST_PINGS = 2048
"""A second: of more than 512 members each gets fewer."""


class Pulse:
    """Of one run; used in the coordinator's thread.

    Args:
        timeout: seconds of silence after which a member counts as lost.
    """

    def __init__(
        self,
        roster: Roster,
        failures: Failures,
        recoveries: Recoveries,
        send: Callable[[bytes, Any], bool],
        timeout: float,
    ) -> None:
        self._roster, self._failures, self._recoveries = roster, failures, recoveries
        self._send, self._timeout = send, timeout
        self._due = 0.0

    def hurry(self) -> None:
        """The next ping is due at once."""
        self._due = 0.0

    def tick(self, now: float, granted: int) -> None:
        """Pings everybody, if that is due at `now` (monotonic seconds)."""
        if now < self._due:
            return
        members = tuple(self._roster.everybody())
        self._due = now + max(PING_SECONDS, len(members) / MOST_PINGS)
        ping = Beat(position=granted)
        silence = f"no heartbeat for {self._timeout:g} s"
        for member in members:
            is_worker = isinstance(member.hello, Hello)
            if member.gone:
                continue
            if not self._send(member.identity, ping):
                (self._recoveries.gone if is_worker else self._recoveries.away)(member, "its connection closed")
            elif now - member.heard > self._timeout:
                (self._recoveries.silent if is_worker else self._failures.lost)(member, silence)
