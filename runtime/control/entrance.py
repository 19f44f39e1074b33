"""The coordinator's socket: who gets in, and how many.

A stranger fails in CurveZMQ's handshake, for which it has 5 seconds (more where hundreds come together), before a byte
of a message is read from it. What it can take meanwhile is bounded: so many connections, each of at most one frame.
"""

import contextlib
import ctypes
import os
import resource
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message
from zmq.utils.z85 import encode

from unlocked.runtime.control.address import Address, KeyPair
from unlocked.runtime.control.messages import MAX_FRAME_BYTES

__all__ = ["Door", "Entrance", "most_connections"]

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27  # <asm-generic/socket.h>
_HANDSHAKE_SECONDS = 5.0
_ONE_HANDSHAKE_SECONDS = 0.005  # of a busy core: who comes with many others waits for theirs
_WAITING = 64  # messages of each connection, where this thread has no core: a thousand of each of 2,048 are 500 MB
_OTHER_FILES = 256  # that a process has open beside its connections
_MEETING_FILES = 3
"""Of each rank, in rank 0's process: two connections to the store (worker, supervisor), one of the roll call."""
_STORE_STRANGERS = 4096  # at once, at the store's port, which takes whoever comes until the run has begun
_STRANGERS = 64  # at once, beside the run's own processes
_ZAP = "inproc://zeromq.zap.01"  # RFC 27: where libzmq asks who may come in
_WATCHED = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def most_connections(stages: int) -> int:
    """That the coordinator takes at once: of every stage's worker and supervisor, of those that replace them, and of
    strangers who have not failed yet."""
    return 4 * stages + _STRANGERS


class Door:
    """The port of a bound socket. Open at first. A socket of the file system needs none: its folder is the user's.

    Only Linux can close it without ZeroMQ's knowledge, whose own way would end the connections as well: a filter that
    drops every packet to the listening socket.
    """

    def __init__(self, listener: socket.socket | None) -> None:
        self._listener = listener
        self._needed, self._crowded = True, False
        self._is_open = True

    def close(self) -> None:
        """Nobody new comes in, so that no stranger takes a descriptor of this process; who is in, stays. Idempotent."""
        self._needed = False
        self._apply()

    def open(self) -> None:
        """Who comes in place of a worker that has died may come in. Idempotent."""
        self._needed = True
        self._apply()

    def crowd(self, is_full: bool) -> None:
        """While there are too many nobody comes in."""
        self._crowded = is_full
        self._apply()

    def remove(self) -> None:
        """The port is given back, once ZeroMQ has left it too. Idempotent."""
        if self._listener is not None:
            self._listener.close()

    def _apply(self) -> None:
        is_open = self._needed and not self._crowded
        if is_open is self._is_open or self._listener is None or self._listener.fileno() < 0 or sys.platform != "linux":
            return
        self._is_open = is_open
        with contextlib.suppress(OSError):
            if is_open:
                self._listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            else:
                drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K, 0 bytes kept
                program = struct.pack("HL", 1, ctypes.addressof(drop))  # struct sock_fprog
                self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


class Entrance:
    """A bound ROUTER socket that lets in whom `admits` knows. Use in one thread, save for the construction.

    Args:
        host: see `Coordinator`; or `ipc://PATH`.
        most: connections at once.
        ranks: processes that meet in this one's store, which takes descriptors too.
        admits: whether a public key (Z85) is that of one of the run's processes; asked once per connection of somebody
            who knows the coordinator's own.

    Raises:
        ValueError: the port is taken, or the host is not this machine's, or so many connections are not allowed.
    """

    def __init__(
        self,
        context: "zmq.Context[Any]",
        host: str,
        port: int,
        advertise: str | None,
        *,
        most: int,
        admits: Callable[[bytes], bool],
        ranks: int = 0,
    ) -> None:
        self._most, self._admits = most, admits
        _allow_files(most + _OTHER_FILES, _MEETING_FILES * ranks + _STORE_STRANGERS)
        keys = KeyPair.new()
        self.socket = context.socket(zmq.ROUTER)
        self._asked = context.socket(zmq.REP)
        self._asked.bind(_ZAP)
        self._monitor = self.socket.get_monitor_socket(_WATCHED)
        self._connections: set[int] = set()
        self.strangers = 0
        """Connections so far that have not come through the handshake."""
        try:
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a closed connection then fails, not vanishes
            self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            self.socket.setsockopt(zmq.RCVHWM, _WAITING)
            self.socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the heartbeat timeout: a few pings and grants per worker
            self.socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * (_HANDSHAKE_SECONDS + most * _ONE_HANDSHAKE_SECONDS)))
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            endpoint, self.door = _bind(self.socket, host, port, advertise, backlog=most)
        except ValueError:
            self.close(linger=0)
            raise
        self.address = Address(endpoint, keys.public)

    def register(self, poller: zmq.Poller) -> None:
        """All that `serve` reacts to."""
        for one in (self.socket, self._asked, self._monitor):
            poller.register(one, zmq.POLLIN)

    def serve(self) -> None:
        """Answers who may come in, and counts who is there."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._answer(self._asked.recv_multipart(zmq.DONTWAIT))
        with contextlib.suppress(zmq.Again):
            while True:
                self._note(recv_monitor_message(self._monitor, zmq.DONTWAIT))
                self.door.crowd(len(self._connections) >= self._most)
        self.door.crowd(len(self._connections) >= self._most)

    def close(self, linger: int) -> None:
        """Frees the port; `linger`: milliseconds for what is on its way."""
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self._asked.close(linger=0)
        self.socket.close(linger=linger)

    def _answer(self, request: list[bytes]) -> None:
        # RFC 27: version, request, domain, address, identity, mechanism, credentials
        version, number = request[:2]
        is_known = len(request) == 7 and request[5] == b"CURVE" and self._admits(encode(request[6]))
        status = (b"200", b"OK") if is_known else (b"400", b"not of this run")
        self._asked.send_multipart([version, number, *status, b"", b""])

    def _note(self, event: Any) -> None:
        if event["event"] == zmq.EVENT_ACCEPTED:
            self._connections.add(event["value"])  # its descriptor
            self.strangers += 1
        elif event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.strangers -= 1
        else:
            self._connections.discard(event["value"])


def _allow_files(count: int, more: int) -> None:
    """Raises the soft limit on this process's open files to what it needs, and as far as it can to what it may need
    beside that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count + more:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ValueError(
            f"the coordinator needs {count} open files for the connections of all stages, but the limit is {hard}; "
            "raise it (ulimit -Hn, or LimitNOFILE of the service)"
        )
    most = count + more if hard == resource.RLIM_INFINITY else min(count + more, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _bind(router: "zmq.Socket[Any]", host: str, port: int, advertise: str | None, *, backlog: int) -> tuple[str, Door]:
    """The endpoint that workers connect to, and its door."""
    listener: socket.socket | None = None
    try:
        if host.startswith("ipc://"):
            router.bind(host)
            return host, Door(None)
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = str(resolved[0])
        listener = socket.create_server(resolved[:2], family=family, backlog=backlog)
        port = listener.getsockname()[1]
        numeric = f"[{ip}]" if family == socket.AF_INET6 else ip
        router.setsockopt(zmq.IPV6, int(family == socket.AF_INET6))
        router.setsockopt(zmq.USE_FD, os.dup(listener.fileno()))  # ZeroMQ closes this one
        router.bind(f"tcp://{numeric}:{port}")
    except (OSError, zmq.ZMQError) as error:
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
    return f"tcp://{reachable}:{port}", Door(listener)
