"""What becomes of a worker that has died: its supervisor is told to start the next one, or the run ends by name.

Local rules make this cheap: a stage depends on nothing but its own history and what came in. So the others go on; the
new incarnation begins at the stage's own last snapshot and reads again what its neighbour has logged.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.entrance import Door
from unlocked.runtime.control.failures import Failures
from unlocked.runtime.control.lifeline import quiet_seconds
from unlocked.runtime.control.member import Member, Roster
from unlocked.runtime.metrics.records import Recovery

__all__ = ["Recoveries"]

HOUR = 3600.0
WORD_SECONDS = 5.0
"""That a supervisor may take to say how its worker ended, after the worker's connection has closed."""
RETURN_SECONDS = 5.0
"""That a supervisor may take to make its connection anew: its own end looks the same from another machine."""
_AHEAD = 0.75  # the door is open before a supervisor that hears nothing makes its connection anew
SAME_PLACE = 4
"""Deaths of one stage at the same position, after which a further one is taken to be no accident."""


@dataclass(slots=True)
class _Revival:
    """A stage that is between two workers, or whose new one does the old one's work again."""

    cause: str
    incarnation: int
    began: float


class Recoveries:
    """Of one run; its methods are called in the coordinator's thread.

    Args:
        send: takes a connection's identity and a message.
        on_recovery: told of every recovery that has succeeded.
        silence: seconds without a word after which a process counts as lost; also those that a worker may take to say
            hello once it is asked for.
        door: open while somebody is expected.
        first: where the stream begins.
    """

    def __init__(
        self,
        roster: Roster,
        failures: Failures,
        *,
        send: Callable[[bytes, Any], bool],
        on_recovery: Callable[[Recovery], object],
        silence: float,
        door: Door,
        first: int,
    ) -> None:
        self._roster, self._failures, self._first = roster, failures, first
        self.most = 0
        """Recoveries within an hour; a further one ends the run. 0: workers have no supervisors."""
        self._send, self._on_recovery, self._silence = send, on_recovery, silence
        self._door = door
        self.store: Door | None = None
        """Of the store, of which new workers ask how to reach their neighbours; closed while none is expected."""
        self._store_is_shut = False
        self._revivals: dict[int, _Revival] = {}
        self._silent_since: dict[int, float] = {}  # stages whose worker's connection has closed
        self._awaited_since: dict[int, float] = {}  # stages whose supervisor is about to start a worker
        self._away_since: dict[int, float] = {}  # stages whose supervisor's connection has closed
        self._times: deque[float] = deque()  # of the last hour's recoveries
        self._places: dict[int, tuple[int, int]] = {}  # stage -> position of its last death, and deaths there

    @property
    def pending(self) -> bool:
        """Some stage has no worker just now."""
        return bool(self._revivals or self._silent_since or self._awaited_since or self._away_since)

    def died(self, supervisor: Member, message: m.Died) -> None:
        """A supervisor says that its worker has ended."""
        stage = supervisor.hello.stage
        worker = self._roster.workers.get(stage)
        if all(one.finished for one in self._roster.workers.values()):
            return  # the run is complete
        if self._failures.first is not None or worker is None or not self._is_latest(worker, message.incarnation):
            return
        worker.position = max(worker.position, message.position)
        if message.again:
            self._revive(worker, message.how)
        else:
            self._failures.fail(f"{worker.name} is lost after position {worker.position}: its worker {message.how}")

    def gone(self, worker: Member, why: str) -> None:
        """A worker's connection has closed: with a supervisor, that one will say more."""
        if worker.gone:
            return
        if not self.most or worker.hello.stage not in self._roster.supervisors:
            self._failures.lost(worker, why)
        else:
            self._silent_since.setdefault(worker.hello.stage, time.monotonic())

    def silent(self, worker: Member, why: str) -> None:
        """A worker gives no sign of life. Whatever it is about: it won't come back as part of this run."""
        if worker.gone or worker.finished:
            return
        if not self.most or worker.hello.stage not in self._roster.supervisors or not self._roster.is_complete:
            self._failures.lost(worker, why)
        else:
            self._revive(worker, f"had {why}")

    def away(self, supervisor: Member, why: str) -> None:
        """A supervisor's connection has closed. Once the run has begun it may make it anew, if it is still there."""
        stage = supervisor.hello.stage
        if supervisor.has_ended or not self._roster.is_complete:
            self._failures.lost(supervisor, why)
        elif stage not in self._away_since:
            supervisor.gone = True
            self._away_since[stage] = time.monotonic()
            self._door.open()

    def is_late(self, hello: m.Hello) -> bool:
        """Whether this is the hello of a worker that has been replaced meanwhile: of its death its supervisor has told,
        by another connection, before its own words came."""
        revival, worker = self._revivals.get(hello.stage), self._roster.workers.get(hello.stage)
        if revival is not None:
            return hello.incarnation < revival.incarnation
        return worker is not None and isinstance(worker.hello, m.Hello) and hello.incarnation < worker.hello.incarnation

    def met(self, member: Member) -> None:
        """A worker or a supervisor has said hello."""
        stage = member.hello.stage
        if isinstance(member.hello, m.Hello):
            self._awaited_since.pop(stage, None)
        elif stage not in self._roster.workers:
            self._awaited_since[stage] = time.monotonic()

    def came_back(self, member: Member) -> None:
        """A worker has said hello in the place of another one; or a supervisor by another connection: it hears what it
        may have missed, and has its time again for what it may have been about to say."""
        stage, now, hello = member.hello.stage, time.monotonic(), member.hello
        if isinstance(hello, m.Hello):
            self._silent_since.pop(stage, None)
            return
        self._away_since.pop(stage, None)
        for since in (self._silent_since, self._awaited_since):
            if stage in since:
                since[stage] = now
        revival = self._revivals.get(stage)
        if revival is not None and hello.incarnation < revival.incarnation:
            self._send(member.identity, m.Revive(incarnation=revival.incarnation))

    def replayed(self, worker: Member, message: m.Replayed) -> None:
        """A new worker has come to where the one before it was."""
        stage = worker.hello.stage
        revival = self._revivals.get(stage)
        if revival is None or revival.incarnation != message.incarnation:
            return
        del self._revivals[stage]
        recovery = Recovery(
            stage=stage,
            incarnation=message.incarnation,
            cause=revival.cause,
            position=message.position,
            replayed=message.replayed,
            seconds=time.monotonic() - revival.began,
            ended=time.time(),
        )
        self._on_recovery(recovery)

    def tick(self, now: float) -> None:
        """What is due at `now` (monotonic seconds)."""
        self._turn_the_key(now)
        self._miss_supervisors(now)
        if self.store is not None and not self._store_is_shut and self._all_linked:
            self._store_is_shut = True
            self.store.close()
        for stage, since in tuple(self._silent_since.items()):
            if now - since > self._word_seconds and stage not in self._away_since:
                del self._silent_since[stage]
                self._end_silence(self._roster.workers[stage])
        for stage, since in tuple(self._awaited_since.items()):
            if now - since > self._silence and stage not in self._away_since:
                del self._awaited_since[stage]
                why, worker = f"did not report within {self._silence:g} s", self._roster.workers.get(stage)
                if worker is not None:
                    self._revive(worker, why)
                else:
                    self._failures.fail(f"{self._roster.name(stage)} is lost: its worker {why}")

    def _end_silence(self, worker: Member) -> None:
        """A worker's connection closed a while ago, and its supervisor, who is there, has seen no end of it: it stands
        still, and is replaced."""
        if self._failures.first is not None:
            self._failures.lost(worker, "its connection closed")
        elif not worker.finished:
            self._revive(worker, f"lost its connection and did not end within {self._word_seconds:g} s")

    def _miss_supervisors(self, now: float) -> None:
        """Those that are away are lost after a while, unless they may go by now."""
        for stage, since in tuple(self._away_since.items()):
            supervisor = self._roster.supervisors[stage]
            why = "its connection closed"
            if now - since > RETURN_SECONDS:
                why += f", and it made no other within {RETURN_SECONDS:g} s"
            elif not supervisor.has_ended:
                continue
            del self._away_since[stage]
            if not all(one.finished for one in self._roster.workers.values()):
                self._failures.lost(supervisor, why)

    def _turn_the_key(self, now: float) -> None:
        """The door is open while somebody is missing, or may be about to make a connection anew."""
        if not self._roster.is_complete:
            return
        quiet = _AHEAD * quiet_seconds(self._silence)
        is_missing = any(one.gone for one in self._roster.everybody())
        if is_missing or any(now - one.heard > quiet for one in self._roster.supervisors.values()):
            self._door.open()
        else:
            self._door.close()

    @property
    def _word_seconds(self) -> float:
        """That a supervisor has for its word. Its worker's neighbours wait for two silences: there must be time left to
        replace the worker, or to see within one silence that nothing can."""
        return min(WORD_SECONDS, self._silence / 2)

    @property
    def _all_linked(self) -> bool:
        """Every worker has its edges, and a next item: each has done one, or as many as a dead one before it."""
        workers = self._roster.workers.values()
        return (
            self._roster.is_complete
            and not self.pending
            and all(worker.position > self._first for worker in workers)
            and not all(worker.finished for worker in workers)
        )

    def _is_latest(self, worker: Member, incarnation: int) -> bool:
        """Whether the news is not about a worker that has been replaced."""
        revival = self._revivals.get(worker.hello.stage)
        assert isinstance(worker.hello, m.Hello)
        latest = revival.incarnation if revival is not None else worker.hello.incarnation
        return incarnation == latest

    def _revive(self, worker: Member, cause: str) -> None:
        stage, now = worker.hello.stage, time.monotonic()
        place, deaths = self._places.get(stage, (-1, 0))
        deaths = deaths + 1 if place == worker.position else 1
        self._places[stage] = worker.position, deaths
        while self._times and now - self._times[0] > HOUR:
            self._times.popleft()
        if deaths > SAME_PLACE:
            problem = f"for the {deaths}th time at the same place"
        elif len(self._times) >= self.most:
            problem = f"and {self.most} recoveries within an hour are used up (--max-recoveries)"
        else:
            self._times.append(now)
            revival = self._revivals.get(stage)
            assert isinstance(worker.hello, m.Hello)
            number = 1 + (worker.hello.incarnation if revival is None else revival.incarnation)
            began = now if revival is None else revival.began
            self._revivals[stage] = _Revival(cause, number, began)
            self._silent_since.pop(stage, None)
            self._awaited_since[stage] = now
            worker.gone, worker.chunks = True, []
            self._door.open()
            if self.store is not None:
                self._store_is_shut = False
                self.store.open()
            self._send(self._roster.supervisors[stage].identity, m.Revive(incarnation=number))
            return
        self._failures.fail(f"{worker.name} is lost after position {worker.position}: its worker {cause}, {problem}")
