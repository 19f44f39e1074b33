"""What a dead worker has said may come after the word of its death, which came by another connection."""

from typing import Any

import pytest
import zmq
from coordination import LAYERS, TIMEOUT, until

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.coordinator import Coordinator

pytestmark = pytest.mark.alone


class Peer:
    """A worker, or a supervisor, that says what it is told to."""

    def __init__(self, context: "zmq.Context[Any]", coordinator: Coordinator) -> None:
        self._socket, self._monitor = dial(context, Address.parse(coordinator.address), KeyPair.new())

    def say(self, message: Any) -> None:
        self._socket.send(m.pack(message))

    def hear(self, kind: type) -> Any:
        """The next message of that kind."""
        while True:
            assert self._socket.poll(1000 * TIMEOUT), f"no {kind.__name__}"
            message = m.unpack(self._socket.recv_multipart())
            assert not isinstance(message, m.Abort), message
            if isinstance(message, kind):
                return message

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)


def hello(stage: int, incarnation: int = 0) -> m.Hello:
    return m.Hello(stage=stage, rank=stage, pid=1, host="here", layers=LAYERS[stage], incarnation=incarnation)


def test_a_late_hello_takes_nobodys_place_and_shuts_no_door() -> None:
    with Coordinator(LAYERS[:1], 1000) as coordinator, zmq.Context() as context:
        coordinator.expect_supervisors(10)
        supervisor, first, second, third = (Peer(context, coordinator) for _ in range(4))
        supervisor.say(m.Supervise(stage=0, rank=0, pid=2, host="here", layers=LAYERS[0]))
        first.say(hello(0))
        first.hear(m.Start)
        supervisor.say(m.Died(incarnation=0, position=3, how="was ended by SIGKILL", again=True))
        assert supervisor.hear(m.Revive).incarnation == 1
        supervisor.say(m.Died(incarnation=1, position=3, how="was ended by SIGKILL", again=True))
        assert supervisor.hear(m.Revive).incarnation == 2
        ignored = coordinator.ignored_frames
        second.say(hello(0, 1))
        second.say(m.Beat(position=9))  # of somebody whom nobody knows
        until(lambda: coordinator.ignored_frames > ignored)
        fresh = Peer(context, coordinator)  # the door is still open
        fresh.say(hello(0, 2))
        fresh.hear(m.Start)
        third.say(hello(0, 1))
        third.say(m.Beat(position=9))
        until(lambda: coordinator.ignored_frames > ignored + 1)
        fresh.say(m.Replayed(incarnation=2, position=0, replayed=3))
        until(lambda: bool(coordinator.recoveries))
        assert coordinator.first_failure is None
        for peer in (supervisor, first, second, third, fresh):
            peer.close()
