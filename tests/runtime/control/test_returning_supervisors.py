"""A supervisor whose connection breaks makes it anew, and hears what it has missed; one that does not come is lost."""

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import zmq
from coordination import LAYERS, until

from unlocked.runtime.control import messages as m
from unlocked.runtime.control import recoveries
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.lifeline import Lifeline

pytestmark = pytest.mark.alone


def supervise(returns: int = 0, **other: Any) -> m.Supervise:
    return m.Supervise(
        **{"stage": 0, "rank": 0, "pid": 1, "host": "there", "layers": LAYERS[0], "returns": returns, **other}
    )


class Relay:
    """Between a supervisor and the coordinator, as a middlebox: it may close its connections, or forget them."""

    def __init__(self, port: int) -> None:
        self._port, self._selector = port, selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._orders: list[str] = []
        for one in (self._listener, self._woken):
            self._selector.register(one, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def order(self, what: str) -> None:
        """`close` all connections, with a reset; `forget` them; `refuse` new ones; `end`."""
        self._orders.append(what)
        self._wake.send(b"\0")

    def close(self) -> None:
        self.order("end")
        self._thread.join(10.0)

    def _run(self) -> None:
        pairs: dict[socket.socket, socket.socket] = {}
        while True:
            for key, _ in self._selector.select():
                one: Any = key.fileobj
                if one is self._woken:
                    self._woken.recv(100)
                elif one is self._listener:
                    near, _ = self._listener.accept()
                    far = socket.create_connection(("127.0.0.1", self._port))
                    pairs |= {near: far, far: near}
                    for end in (near, far):
                        self._selector.register(end, selectors.EVENT_READ)
                elif one in pairs:
                    self._pass_on(one, pairs)
            while self._orders:
                order = self._orders.pop(0)
                if order in ("close", "forget", "end"):
                    for end in pairs:
                        with suppress(KeyError):
                            self._selector.unregister(end)
                        if order != "forget":
                            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                            end.close()
                    if order == "forget":
                        self._forgotten = list(pairs)  # nobody is told
                    pairs.clear()
                if order in ("refuse", "end") and self._listener.fileno() >= 0:
                    self._selector.unregister(self._listener)
                    self._listener.close()
                if order == "end":
                    return

    def _pass_on(self, one: socket.socket, pairs: dict[socket.socket, socket.socket]) -> None:
        data = b""
        with suppress(OSError):
            data = one.recv(65536)
        if data:
            pairs[one].sendall(data)
            return
        other = pairs.pop(one)
        del pairs[other]
        for end in (one, other):
            self._selector.unregister(end)
            end.close()


@contextmanager
def supervised_run() -> Iterator[tuple[Coordinator, Relay, Lifeline, list[Any]]]:
    """One stage, whose supervisor reaches the coordinator through a relay; the last: what the hello adds to its own."""
    with Coordinator(LAYERS[:1], 1000, heartbeat_timeout=9.0) as coordinator, zmq.Context() as context:
        coordinator.expect_supervisors(10)
        address = Address.parse(coordinator.address)
        relay = Relay(int(address.endpoint.rpartition(":")[2]))
        via = Address(f"tcp://127.0.0.1:{relay.port}", address.public_key)
        said: list[Any] = []
        lifeline = Lifeline(via, KeyPair.new(), lambda n: [supervise(n), *said], 9.0)
        worker, monitor = dial(context, address, KeyPair.new())
        worker.send(m.pack(m.Hello(stage=0, rank=0, pid=2, host="there", layers=LAYERS[0])))
        try:
            hear(lifeline, m.Start)
            yield coordinator, relay, lifeline, said
        finally:
            lifeline.close()
            relay.close()
            worker.disable_monitor()
            monitor.close(linger=0)
            worker.close(linger=0)


def hear(lifeline: Lifeline, kind: type) -> Any:
    """The next message of that kind, as a supervisor waits for it."""
    found: list[Any] = []

    def look() -> bool:
        lifeline.wait([], 0.05)
        found.extend(one for one in lifeline.receive() if isinstance(one, kind))
        lifeline.mend(may_return=True)
        lifeline.beat(0.1)
        assert lifeline.problem("stage 0") is None
        return bool(found)

    until(look)
    return found[0]


@pytest.mark.parametrize("how", ["close", "forget"])
def test_a_broken_connection_is_made_anew_and_what_was_missed_is_said_again(how: str) -> None:
    with supervised_run() as (coordinator, relay, lifeline, said):
        relay.order(how)
        died = m.Died(incarnation=0, position=3, how="was ended by SIGKILL", again=True)
        lifeline.send(died)  # may be lost
        said.append(died)
        assert hear(lifeline, m.Revive).incarnation == 1
        assert lifeline.count >= 1
        relay.order(how)  # an order that may have been lost is given again to who has not followed it
        assert hear(lifeline, m.Revive).incarnation == 1
        assert coordinator.first_failure is None
        coordinator.request_stop()
        hear(lifeline, m.Stop)


def test_a_supervisor_that_makes_no_other_connection_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoveries, "RETURN_SECONDS", 0.5)
    with supervised_run() as (coordinator, relay, _, _):
        relay.order("close")
        until(lambda: coordinator.first_failure is not None)
        assert "stage 0 (rank 0: conv1, conv2) is lost" in str(coordinator.first_failure)
        assert "its connection closed, and it made no other within 0.5 s" in str(coordinator.first_failure)


def test_a_coordinator_that_is_no_more_is_told_from_a_broken_connection() -> None:
    with supervised_run() as (_, relay, lifeline, _):
        relay.order("refuse")
        relay.order("close")

        def is_gone() -> bool:
            lifeline.wait([], 0.05)
            lifeline.receive()
            lifeline.mend(may_return=True)
            return "is gone: its connection closed" in str(lifeline.problem("stage 0"))

        until(is_gone)


def test_another_process_takes_no_supervisors_place() -> None:
    with supervised_run() as (coordinator, _, _, _), zmq.Context() as context:
        other, monitor = dial(context, Address.parse(coordinator.address), KeyPair.new())
        try:
            other.send(m.pack(supervise(pid=7)))
            until(lambda: coordinator.first_failure is not None)  # let in when the supervisor has been quiet for long
            assert "joined twice" in str(coordinator.first_failure)
        finally:
            other.disable_monitor()
            monitor.close(linger=0)
            other.close(linger=0)
