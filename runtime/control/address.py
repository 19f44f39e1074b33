"""How the workers of a run reach its coordinator, and how each side knows the other: CurveZMQ with keys made per run.

Nothing secret leaves a process: the coordinator's public key travels with its address, a worker's own public key to the
coordinator, both through the store at which the run's processes meet. Without them there is no handshake, and behind
it all is encrypted (RFC 26, CurveZMQ).
"""

from dataclasses import dataclass
from typing import Any

import zmq

from unlocked.runtime.control.messages import MAX_FRAME_BYTES, pack

__all__ = ["Address", "KeyPair", "Post", "dial"]

_KEY_LENGTH = 40  # of 32 bytes in Z85 (RFC 32)
_TRANSPORTS = ("tcp://", "ipc://")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """One process's long-term keys in a run, as Z85 text of 40 characters."""

    public: bytes
    secret: bytes

    @classmethod
    def new(cls) -> "KeyPair":
        """Raises:
        ValueError: this machine's ZeroMQ was built without CURVE.
        """
        if not zmq.has("curve"):
            raise ValueError(
                "the installed libzmq has no CURVE, by which workers and coordinator know each other; install pyzmq "
                "from PyPI (pip install --force-reinstall pyzmq), whose libzmq has it"
            )
        return cls(*zmq.curve_keypair())

    def __repr__(self) -> str:  # the secret stays out of logs
        return f"KeyPair({self.public.decode()})"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the coordinator listens, and its public key; travels as one string."""

    endpoint: str
    public_key: bytes

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Reads `str(address)` back.

        Raises:
            ValueError: the text is not a coordinator's address.
        """
        # Counted from the end: a path may hold a "#", and so may a key.
        endpoint, mark, key = text[: -_KEY_LENGTH - 1], text[-_KEY_LENGTH - 1 : -_KEY_LENGTH], text[-_KEY_LENGTH:]
        try:
            if mark != "#":
                raise ValueError
            zmq.curve_public(key.encode())  # takes any key apart
        except (ValueError, zmq.ZMQError):
            key = ""
        if not endpoint.startswith(_TRANSPORTS) or not key:
            endpoint = text.partition("#")[0]  # without what may be a key
            raise ValueError(f"{endpoint!r} is not a coordinator's address; valid: tcp://HOST:PORT#KEY, ipc://PATH#KEY")
        return cls(endpoint, key.encode())

    def __str__(self) -> str:
        return f"{self.endpoint}#{self.public_key.decode()}"

    def __repr__(self) -> str:
        return f"Address({self.endpoint})"


def dial(
    context: "zmq.Context[Any]",
    address: Address,
    keys: KeyPair,
    watched: int = zmq.EVENT_DISCONNECTED,
    patience: int = 0,
) -> tuple["zmq.Socket[Any]", "zmq.Socket[Any]"]:
    """A DEALER that connects to the coordinator, and its monitor, which tells when the connection has dropped.

    Args:
        watched: the events of which the monitor tells.
        patience: milliseconds of one attempt; 0: the system's.
    """
    dealer = context.socket(zmq.DEALER)
    monitor = dealer.get_monitor_socket(watched)  # of one peer: its events need no mapping
    dealer.setsockopt(zmq.CONNECT_TIMEOUT, patience)
    dealer.setsockopt(zmq.IPV6, int("[" in address.endpoint))
    dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    dealer.setsockopt(zmq.CURVE_SERVERKEY, address.public_key)
    dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    dealer.connect(address.endpoint)
    return dealer, monitor


class Post:
    """What goes out of a ROUTER socket; used in its thread."""

    def __init__(self, router: "zmq.Socket[Any]") -> None:
        self._router = router
        self._latest: tuple[Any, bytes] = (None, b"")

    def send(self, identity: bytes, message: Any) -> bool:
        """False if the connection is gone. A connection that is congested loses the message."""
        # One message often goes to everybody: it is packed once.
        if self._latest[0] is not message:
            self._latest = (message, pack(message))
        try:
            self._router.send(identity, zmq.DONTWAIT | zmq.SNDMORE)
            self._router.send(self._latest[1], zmq.DONTWAIT)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True
