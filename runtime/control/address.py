"""Where the coordinator listens, and how the workers learn of it."""

import contextlib
import ctypes
import os
import secrets
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any

import zmq

from unlocked.runtime.control.messages import MAX_FRAME_BYTES, pack

__all__ = ["Address", "Door", "Post", "listen"]

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # <asm-generic/socket.h>


@dataclass(frozen=True, slots=True)
class Address:
    """Where the coordinator listens, and the run's token; travels as one string."""

    endpoint: str
    token: bytes

    @classmethod
    def new(cls, endpoint: str) -> "Address":
        return cls(endpoint, secrets.token_bytes(16))

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Reads `str(address)` back.

        Raises:
            ValueError: the text is not a coordinator's address.
        """
        endpoint, _, token = text.partition("#")
        try:
            secret = bytes.fromhex(token)
        except ValueError:
            secret = b""
        if not endpoint.startswith("tcp://") or not secret:
            raise ValueError(f"{endpoint!r} is not a coordinator's address; valid: tcp://HOST:PORT#TOKEN")
        return cls(endpoint, secret)

    def __str__(self) -> str:
        return f"{self.endpoint}#{self.token.hex()}"

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Address({self.endpoint})"


class Door:
    """The port of a bound socket. Open at first."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener

    def close(self) -> None:
        """Nobody new comes in, so that no stranger takes a descriptor of this process; who is in, stays. Idempotent.

        Only Linux can do that without ZeroMQ's knowledge, whose own way would end the connections as well: a filter
        that drops every packet to the listening socket.
        """
        if self._listener.fileno() >= 0 and sys.platform == "linux":
            drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K with 0 bytes kept
            program = struct.pack("HL", 1, ctypes.addressof(drop))  # struct sock_fprog
            with contextlib.suppress(OSError):
                self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def open(self) -> None:
        """Who comes in place of a worker that has died may come in. Idempotent."""
        if self._listener.fileno() >= 0 and sys.platform == "linux":
            with contextlib.suppress(OSError):  # it is open
                self._listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    def remove(self) -> None:
        """The port is given back, once ZeroMQ has left it too. Idempotent."""
        self._listener.close()


def listen(
    context: "zmq.Context[Any]", host: str, port: int, advertise: str | None
) -> tuple["zmq.Socket[Any]", str, Door]:
    """A bound ROUTER socket, the endpoint that workers connect to, and its door; see `Coordinator` for the arguments.

    Raises:
        ValueError: the port is taken, or the host is not this machine's.
    """
    router = context.socket(zmq.ROUTER)
    listener: socket.socket | None = None
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = str(resolved[0])
        listener = socket.create_server(resolved[:2], family=family, backlog=1024)
        port = listener.getsockname()[1]
        numeric = f"[{ip}]" if family == socket.AF_INET6 else ip
        router.setsockopt(zmq.IPV6, int(family == socket.AF_INET6))
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a closed connection then fails instead of vanishing
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        router.setsockopt(zmq.SNDHWM, 0)  # bounded by the heartbeat timeout: a few pings and grants per worker
        router.setsockopt(zmq.USE_FD, os.dup(listener.fileno()))  # ZeroMQ closes this one
        router.setsockopt(zmq.HANDSHAKE_IVL, 5000)  # milliseconds: a stranger who says nothing then goes
        router.bind(f"tcp://{numeric}:{port}")
    except (OSError, zmq.ZMQError) as error:
        router.close(linger=0)
        if listener is not None:
            listener.close()
        if error.errno == zmq.EADDRINUSE:
            text = f"port {port} on {host} is taken; pass --coordinator-port 0 for any free one"
        else:
            text = f"the coordinator can't listen on host {host!r}, port {port}: {error}; give this machine's address"
        raise ValueError(text) from error
    wildcard = numeric in ("0.0.0.0", "[::]")
    reachable = advertise or (socket.gethostname() if wildcard else numeric)
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return router, f"tcp://{reachable}:{port}", Door(listener)


class Post:
    """What goes out of a ROUTER socket; used in its thread."""

    def __init__(self, router: "zmq.Socket[Any]", token: bytes) -> None:
        self._router, self._token = router, token

    def send(self, identity: bytes, message: Any) -> bool:
        """False if the connection is gone. A connection that is congested loses the message."""
        try:
            self._router.send_multipart([identity, *pack(self._token, message)], zmq.DONTWAIT)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True
