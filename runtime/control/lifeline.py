"""A supervisor's connection to the coordinator, which is made anew when it breaks."""

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial

__all__ = ["Lifeline", "quiet_seconds"]

RENEW_SECONDS = 0.5
"""Between two attempts at a connection that breaks again at once."""
ATTEMPT_MILLISECONDS = 1500
"""Without an answer until ZeroMQ tries again: the coordinator's door may have been closed."""
PROBE_SECONDS = 0.3
"""That the look whether anybody listens may take."""


def quiet_seconds(limit: float) -> float:
    """Of silence after which a connection may be a dead one, where `limit` of them mean a loss."""
    return limit / 3


class Lifeline:
    """Use it in one thread.

    Args:
        hello: what is said first on every connection, and again whenever one is made anew; takes how many there were
            before.
        limit: seconds without a word of the coordinator's after which it counts as lost.
    """

    def __init__(self, address: Address, keys: KeyPair, hello: Callable[[int], list[Any]], limit: float) -> None:
        self._address, self._keys, self._hello, self._limit = address, keys, hello, limit
        self._context = zmq.Context()
        self._waiting: deque[Any] = deque()
        self._heard = self._beaten = self._before = self._dialled = time.monotonic()
        self._stood = 0.0
        self._is_gone = self._is_cut = self._is_refused = False
        self.count = 0
        """Connections before this one."""
        self._dial()

    def wait(self, others: list[int], timeout: float) -> None:
        """Until there is something to read, here or on the other descriptors."""
        poller = zmq.Poller()
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        for descriptor in others:
            poller.register(descriptor, zmq.POLLIN)
        poller.poll(max(1, int(1000 * timeout)))
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.DONTWAIT)["event"]
                self._is_cut |= event == zmq.EVENT_DISCONNECTED
                self._is_refused |= event == zmq.EVENT_CLOSED

    def send(self, message: Any) -> None:
        """Reliable while the connection holds; what counts beyond is part of the hello."""
        self._waiting.append(message)
        with contextlib.suppress(zmq.Again):
            while self._waiting:
                self._dealer.send(m.pack(self._waiting[0]), zmq.DONTWAIT)
                self._waiting.popleft()

    def receive(self) -> list[Any]:
        """All that has come."""
        received = []
        with contextlib.suppress(zmq.Again):
            while True:
                frames = self._dealer.recv_multipart(zmq.DONTWAIT)
                with contextlib.suppress(m.MessageError):
                    received.append(m.unpack(frames))
        now = time.monotonic()
        self._stood, self._before = now - self._before, now
        if received:
            self._heard = now
        return received

    def beat(self, interval: float) -> None:
        """A sign of life, if one is due."""
        now = time.monotonic()
        if now - self._beaten >= interval:
            self._beaten = now
            self.send(m.Beat(position=0))

    def mend(self, *, may_return: bool) -> None:
        """Makes the connection anew where it has broken, or may have: one that is silent while the coordinator would
        ping may have been forgotten by whatever lies between, which tells nobody.

        Args:
            may_return: the run has begun; before that nobody waits for this process.
        """
        if self._is_cut and (not may_return or self._address.endpoint.startswith("ipc://")):
            self._is_gone = True
        elif self._is_refused:
            self._is_refused, self._is_gone = False, self._nobody_listens()
        now = time.monotonic()
        is_silent = may_return and now - max(self._heard, self._dialled) > quiet_seconds(self._limit)
        if (self._is_cut or is_silent) and not self._is_gone and now - self._dialled > RENEW_SECONDS:
            self._hang_up(0)
            self.count += 1
            self._dial()

    def problem(self, name: str) -> str | None:
        """Why the coordinator can't be counted on any more."""
        place = f"the coordinator in rank 0's process ({self._address.endpoint})"
        if self._stood > self._limit:  # by now the others have left because of this process, not it because of them
            return f"{name} stood still for {self._stood:.1f} s"
        if self._is_gone:
            return f"{place} is gone: its connection closed"
        if time.monotonic() - self._heard > self._limit:
            return f"{place} is silent for {self._limit:g} s"
        return None

    def close(self) -> None:
        self._hang_up(300)
        self._context.term()

    def _dial(self) -> None:
        watched = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        patience = ATTEMPT_MILLISECONDS if self.count else 0
        self._dealer, self._monitor = dial(self._context, self._address, self._keys, watched, patience)
        self._dialled, self._is_cut = time.monotonic(), False
        self._waiting.clear()
        for message in self._hello(self.count):
            self.send(message)

    def _hang_up(self, linger: int) -> None:
        self._dealer.disable_monitor()
        self._monitor.close(linger=0)
        self._dealer.close(linger=linger)

    def _nobody_listens(self) -> bool:
        """The coordinator's process has ended: its machine refuses. A closed door or a broken way says nothing, or
        something else."""
        place = urlsplit(self._address.endpoint)
        try:
            with socket.create_connection((place.hostname or "", place.port or 0), PROBE_SECONDS):
                return False
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
