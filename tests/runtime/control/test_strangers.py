"""Nobody without a run's keys comes through the handshake, and what strangers can take meanwhile is bounded."""

import contextlib
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from coordination import LAYERS, TIMEOUT, Sink, make_client, until
from strangers import KINDS, Strangers, recorded

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.entrance import most_connections

pytestmark = pytest.mark.alone


def place(coordinator: Coordinator) -> tuple[str, int]:
    host, _, port = Address.parse(coordinator.address).endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def runs(coordinator: Coordinator, **options: object) -> None:
    """The run is what it is without them."""
    with make_client(coordinator.address, 0, **options) as client:
        assert [p for window in client.windows(TIMEOUT) for p in window] == list(range(50))
        client.finish({"fine": True})
    assert coordinator.results(TIMEOUT) == {0: {"fine": True}}
    assert coordinator.stopped is None
    assert coordinator.first_failure is None
    assert coordinator.ignored_frames == 0, "a stranger's message was read"


class Messages(Sink):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def on_message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "replay"])
def test_a_stranger_changes_nothing_and_is_counted(kind: str) -> None:
    sink = Messages()
    with Coordinator(LAYERS[:1], 50, sink=sink) as coordinator:
        strangers = Strangers(*place(coordinator), random.Random(1))
        for number in range(1, 4):
            strangers.speak(kind)
            until(lambda least=number: coordinator.strangers >= least)  # type: ignore[misc]
        runs(coordinator)
        strangers.close()
    assert any("were not of this run, and were refused" in text for text in sink.said)


def test_what_a_worker_said_can_not_be_said_again() -> None:
    """A whole run's bytes, recorded on their way, and sent to the same coordinator once more."""
    with Coordinator(LAYERS[:2], 50) as coordinator:
        host, port = place(coordinator)
        address = Address.parse(coordinator.address)
        with recorded(host, port) as (relayed, heard):
            through = str(Address(f"tcp://127.0.0.1:{relayed}", address.public_key))
            with make_client(through, 0) as client:
                until(lambda: 0 in coordinator._roster.workers)
                client.request_stop(2)
                until(lambda: coordinator.stopped is not None)
                told = coordinator.strangers
                strangers = Strangers(host, port, random.Random(1), bytes(heard))
                strangers.speak("replay")
                until(lambda: coordinator.strangers > told)
                strangers.close()
                assert set(coordinator._roster.workers) == {0}
                assert coordinator.ignored_frames == 0


def test_a_key_that_is_not_the_runs_is_refused_by_one_who_knows_the_coordinators() -> None:
    ours, theirs = KeyPair.new(), KeyPair.new()
    with Coordinator(LAYERS[:1], 50, admits=lambda key: key == ours.public) as coordinator, zmq.Context() as context:
        dealer, monitor = dial(context, Address.parse(coordinator.address), theirs)
        dealer.send(m.pack(m.StopRequest(signal=2)))
        until(lambda: coordinator.strangers > 0)
        runs(coordinator, keys=ours)
        dealer.disable_monitor()
        monitor.close(linger=0)
        dealer.close(linger=0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can drop packets to a listening socket")
def test_connections_are_limited_and_those_that_say_nothing_go() -> None:
    most = most_connections(1)
    with Coordinator(LAYERS[:1], 50) as coordinator, contextlib.ExitStack() as stack:
        taken = 0
        with contextlib.suppress(OSError):
            for _ in range(20 * most):
                stack.enter_context(socket.create_connection(place(coordinator), timeout=0.5))
                taken += 1
        assert most <= taken < 20 * most, "those in the backlog come in too"
        runs(coordinator)  # waits in the kernel until the handshake's time of the others is over


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_unfinished_messages_of_strangers_take_no_memory() -> None:
    with Coordinator(LAYERS[:1], 50) as coordinator:
        strangers = Strangers(*place(coordinator), random.Random(1))
        before = resident()
        for _ in range(30):
            for kind in ("large", "unfinished"):
                strangers.speak(kind)
        strangers.close()
        assert resident() - before < 32 << 20
        runs(coordinator)


@pytest.mark.parametrize("field", ["public", "secret"])
def test_keys_are_made_per_run(field: str) -> None:
    made: list[Callable[[], object]] = [KeyPair.new, KeyPair.new]
    first, second = (getattr(make(), field) for make in made)
    assert first != second


def test_a_secret_key_is_in_no_text() -> None:
    keys = KeyPair.new()
    assert keys.secret.decode() not in repr(keys)


def resident() -> int:
    """Bytes of this process in memory."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])
