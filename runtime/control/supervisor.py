"""A rank's supervisor: starts its stage's workers one after the other, and tells the coordinator how they end.

It does no work of the stage's, so that nothing of a layer, a rule or a library can harm it: it holds what must outlive
a worker (the memory between the stages, the worker's own snapshot), takes the signals, and keeps the caller's process.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair
from unlocked.runtime.control.lifeline import Lifeline
from unlocked.runtime.control.mailbox import Mailbox
from unlocked.runtime.control.zygote import Ended, Told, Zygote, how_it_ended

__all__ = ["Supervisor", "WorkerEnd"]

LAST_WORDS_SECONDS = 2.0
"""That a worker may take to say why it fails, when the run is known to be over."""


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """What a worker has left: word of its `result`, or of its `failure`."""

    what: str
    content: dict[str, Any]


class Supervisor:
    """Use: construct, `open`, `await_word`, `wait_started`, `run`, `close`; `look` wherever else this rank waits.

    Args:
        address: the coordinator's.
        keys: this process's, whose public one the coordinator admits.
        stage, rank, layers: whose worker it is; named in all errors.
        position: to which the stage's workers have come.
        on_abort: called when the run is over for a reason outside this rank; ends the process.
        heartbeat_interval: seconds between signs of life.
        heartbeat_timeout: seconds without a sign of the coordinator after which it counts as lost.

    Raises:
        ValueError: `address` is malformed.
    """

    def __init__(
        self,
        address: str,
        zygote: Zygote,
        *,
        keys: KeyPair,
        stage: int,
        rank: int,
        layers: Sequence[str],
        position: Callable[[], int],
        on_abort: Callable[[str], None],
        heartbeat_interval: float = 1.0,
        heartbeat_timeout: float = 30.0,
    ) -> None:
        self._address, self._keys, self._zygote = Address.parse(address), keys, zygote
        self.stage, self._rank, self._layers = stage, rank, tuple(layers)
        self._position, self._on_abort = position, on_abort
        self._beat_interval, self._beat_timeout = heartbeat_interval, heartbeat_timeout
        self._mailbox = Mailbox()
        self._incarnation = 0
        self._said: dict[str, dict[str, Any]] = {}  # what a worker has said, by the word
        self._end: WorkerEnd | None = None
        self._started = self._bye = False
        self.stopped: m.Stop | None = None
        """Set once an orderly stop is under way."""
        self._stop_request: m.StopRequest | None = None
        self._given_up = ""  # why there can't be another worker
        self._died: m.Died | None = None  # that the coordinator has not answered yet
        self._connection: Lifeline | None = None

    @property
    def name(self) -> str:
        return m.stage_name(self.stage, self._rank, self._layers)

    def open(self) -> None:
        """Says hello, and starts the first worker."""
        self._connection = Lifeline(self._address, self._keys, self._hello, self._beat_timeout)
        self._zygote.start(self._incarnation)

    def await_word(self, what: str) -> dict[str, Any]:
        """Waits for the worker to say that; what comes with it, nothing if the worker has failed."""
        while what not in self._said and self._end is None:
            self.look(self._beat_interval)
        return self._said.get(what, {})

    def look(self, seconds: float) -> None:
        """Takes what has happened, and waits for it up to `seconds`: for whoever has something else to wait for."""
        self._turn(seconds)

    @property
    def end(self) -> WorkerEnd | None:
        """What the worker has left so far."""
        return self._end

    def wait_started(self, timeout: float) -> None:
        """Until all of the run are there, or the worker has failed.

        Raises:
            TimeoutError: some did not come.
        """
        deadline = time.monotonic() + timeout
        while not (self._started or self._end):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: not all processes were there after {timeout:g} s")
            self._turn(self._beat_interval)

    def run(self) -> WorkerEnd:
        """Until the stage's work is done, or has failed for good."""
        while not (self._end is not None and (self._bye or self._end.what != "result")):
            self._turn(self._beat_interval)
        return self._end

    def request_stop(self, signal: int | None = None) -> None:
        """Asks for an orderly stop of all stages. Returns at once; safe in a signal handler."""
        self._mailbox.put(m.StopRequest(signal=signal))

    def close(self) -> None:
        """Ends the worker, if there is one, and all that was for it. Idempotent."""
        self._zygote.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._mailbox.close()

    # --- one turn of the loop

    def _hello(self, returns: int) -> list[Any]:
        """Who this is, and what must be said again after a connection that may have lost it; each counts once."""
        hello = m.Supervise(
            stage=self.stage,
            rank=self._rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            layers=self._layers,
            returns=returns,
            incarnation=self._incarnation,
        )
        return [hello, *filter(None, (self._died, None if self.stopped else self._stop_request))]

    def _turn(self, seconds: float) -> None:
        connection = self._connection
        assert connection is not None
        connection.wait([*self._zygote.descriptors(), self._mailbox.fileno()], min(seconds, self._beat_interval))
        for order in self._mailbox.drain():
            self._stop_request = order
            connection.send(order)
        for event in self._zygote_events(0.0):
            self._take(event)
        if self._zygote.stands_still(self._beat_timeout):
            self._give_up(
                f"can't be replaced: the process that it is forked from stood still for {self._beat_timeout:g} s"
            )
        for message in connection.receive():
            self._obey(message)
        if self._bye:
            return
        connection.mend(may_return=self._started)
        connection.beat(self._beat_interval)
        problem = connection.problem(self.name)
        if problem is not None:
            self._abort(problem)

    def _take(self, event: Ended | Told) -> None:
        if event.incarnation != self._incarnation:
            return  # one that has been replaced
        if isinstance(event, Told):
            if event.what in ("result", "failure"):
                self._end = WorkerEnd(event.what, event.content)
            else:
                self._said[event.what] = event.content
        elif self._end is not None and self._end.what == "result" and event.status == 0:
            self._bye = True  # which it has heard, before it left
        elif self._end is None or (self._end.what == "result" and event.status < 0 and not self._bye):
            left = self._said.pop("left", None)
            if left is not None and not left["cut"] and not self._started:
                self._end = WorkerEnd("aborted", {"message": left["message"]})
            elif left is not None and left["cut"]:
                self._lose("lost its connection to the coordinator", again=True)
            else:
                self._lose(how_it_ended(event.status), again=event.status < 0)

    def _lose(self, how: str, *, again: bool = False) -> None:
        """The worker is gone. Before the run has begun that is the end; then the coordinator decides."""
        if not self._started or self._connection is None:
            self._end = WorkerEnd("lost", {"how": how})
            return
        self._died = m.Died(incarnation=self._incarnation, position=self._position(), how=how, again=again)
        self._connection.send(self._died)

    def _give_up(self, how: str) -> None:
        """There will be no other worker."""
        self._zygote.give_up()
        self._given_up = how
        self._lose(how)

    def _zygote_events(self, seconds: float) -> list[Ended | Told]:
        try:
            return self._zygote.events(seconds)
        except ChildProcessError:
            self._give_up("ended with the process that it is forked from")
            return []

    def _obey(self, message: Any) -> None:
        if isinstance(message, m.Start):
            self._started = True
        elif isinstance(message, m.Stop):
            self.stopped = message
        elif isinstance(message, m.Bye):
            self._bye = True
        elif isinstance(message, m.Revive):
            if message.incarnation <= self._incarnation:
                return  # said twice, over two connections
            self._end = self._died = None
            self._said.clear()
            self._incarnation = message.incarnation
            if self._given_up:  # while the order was under way
                self._lose(self._given_up)
            else:
                self._zygote.start(message.incarnation)
        elif isinstance(message, m.Abort):
            assert self._connection is not None
            self._connection.send(m.AbortSeen())
            self._abort(message.message)

    def _abort(self, message: str) -> None:
        """The run is over, and this process with it, unless it is its own worker that has failed: that one's story
        goes to the caller."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        is_there = True
        while is_there and self._zygote.is_there and self._end is None and time.monotonic() < deadline:
            for event in self._zygote_events(0.05):
                if isinstance(event, Ended):
                    is_there = False
                else:
                    self._take(event)
        if self._end is None or self._end.what != "failure":
            self._zygote.close()
            self._on_abort(message)
