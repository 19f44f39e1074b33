"""Where the coordinator listens, and how the workers learn of it."""

import secrets
import socket
from dataclasses import dataclass
from typing import Any

import zmq

from unlocked.runtime.control.messages import MAX_FRAME_BYTES

__all__ = ["Address", "listen"]


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


def listen(context: "zmq.Context[Any]", host: str, port: int, advertise: str | None) -> tuple["zmq.Socket[Any]", str]:
    """A bound ROUTER socket and the endpoint that workers connect to; see `Coordinator` for the arguments.

    Raises:
        ValueError: the port is taken, or the host is not this machine's.
    """
    router = context.socket(zmq.ROUTER)
    try:
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = str(resolved[0])
        numeric = f"[{ip}]" if family == socket.AF_INET6 else ip
        router.setsockopt(zmq.IPV6, int(family == socket.AF_INET6))
        router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a closed connection then fails instead of vanishing
        router.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        router.setsockopt(zmq.SNDHWM, 0)  # bounded by the heartbeat timeout: a few pings and grants per worker
        router.setsockopt(zmq.BACKLOG, 1024)
        router.bind(f"tcp://{numeric}:{port}")
        bound = str(router.LAST_ENDPOINT, "ascii").rstrip("\0").rpartition(":")[2]
    except (OSError, zmq.ZMQError) as error:
        router.close(linger=0)
        if error.errno == zmq.EADDRINUSE:
            text = f"port {port} on {host} is taken; pass --coordinator-port 0 for any free one"
        else:
            text = f"the coordinator can't listen on host {host!r}, port {port}: {error}; give this machine's address"
        raise ValueError(text) from error
    wildcard = numeric in ("0.0.0.0", "[::]")
    reachable = advertise or (socket.gethostname() if wildcard else numeric)
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return router, f"tcp://{reachable}:{bound}"
