"""A worker's end of its connection to the coordinator: messages in and out, without ever waiting."""

import contextlib
from collections import deque
from typing import Any

import zmq

from unlocked.runtime.control import messages as m

__all__ = ["flush", "received"]


def received(dealer: "zmq.Socket[Any]") -> list[Any]:
    """All messages that have come; what is none is left out."""
    found = []
    with contextlib.suppress(zmq.Again):
        while True:
            frames = dealer.recv_multipart(zmq.DONTWAIT)
            with contextlib.suppress(m.MessageError):
                found.append(m.unpack(frames))
    return found


def flush(dealer: "zmq.Socket[Any]", outbox: deque[Any]) -> None:
    """Sends what the socket takes; the rest stays for the next round."""
    with contextlib.suppress(zmq.Again):
        while outbox:
            dealer.send(m.pack(outbox[0]), zmq.DONTWAIT)
            outbox.popleft()
