"""Who is there before the coordinator knows everybody: a connection from every rank to rank 0, until the run begins.

A worker says hello to the coordinator once it knows its layers. One that dies before that (while rank 0 measures costs,
say) would be missed only by the start timeout; here the end of its connection tells at once, on whatever machine it
ran, and rank 0 tells all the others.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.interfaces import listening_host, meeting_host
from unlocked.runtime.control.presence import lost_in_set_up
from unlocked.runtime.control.set_up import STARTED, pack_verdict, unpack_verdict
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import await_keys, meeting_folder

__all__ = ["RollCall", "answer_roll_call"]

_CONNECT_SECONDS = 5.0
_MOST_STRANGERS = 16  # at once, beside the ranks: each holds a descriptor of this process
_KEY = "roll-call"


class RollCall:
    """Rank 0's side. Use: construct, `release` when the run has begun.

    Args:
        on_verdict: called in a thread when a process has ended that has answered, or has said why the run is over.
    """

    def __init__(self, store: dist.Store, world: World, on_verdict: Callable[[Verdict], object]) -> None:
        self._on_verdict = on_verdict
        self._size = world.size
        self._token = secrets.token_bytes(16)  # an open port hears strangers as well
        self._listener, self._path, place = _listen(world)
        self._listener.setblocking(False)
        self._ranks: dict[socket.socket, int] = {}
        self._strangers: dict[socket.socket, float] = {}  # who has not said its name yet, and since when
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="roll-call", daemon=True)
        store.set(_KEY, json.dumps({**place, "token": self._token.hex()}, allow_nan=False))
        self._thread.start()

    def tell(self, verdict: Verdict) -> None:
        """Everybody hears why the run is over. From any thread."""
        self._say(pack_verdict(verdict))

    def release(self) -> None:
        """From now on a process that ends is the coordinator's business. Idempotent."""
        with contextlib.suppress(OSError):  # it was released before
            self._wake.send(b"\0")  # its end alone would not be seen where a forked child holds it open too
        self._wake.close()
        self._thread.join()

    def _say(self, words: bytes) -> None:
        for connection in tuple(self._ranks):
            with contextlib.suppress(OSError):
                connection.send(words)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            released = False
            while not released:
                for key, _ in selector.select(1.0 if self._strangers else None):
                    if key.fileobj is self._woken:
                        released = True
                    elif key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hear(selector, key.fileobj)
                self._dismiss(selector)
        self._say(STARTED)
        for connection in (*self._ranks, *self._strangers, self._listener, self._woken):
            connection.close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again, or no descriptor is left: whose turn it is stays in the backlog
            time.sleep(0.05)
            return
        connection.setblocking(False)
        self._strangers[connection] = time.monotonic()
        selector.register(connection, selectors.EVENT_READ)

    def _dismiss(self, selector: selectors.BaseSelector) -> None:
        """Whoever takes too long to say its name goes, the eldest first where there are too many."""
        old = time.monotonic() - _CONNECT_SECONDS
        excess = len(self._strangers) - _MOST_STRANGERS - self._size
        for place, (connection, since) in enumerate(tuple(self._strangers.items())):
            if since < old or place < excess:
                selector.unregister(connection)
                del self._strangers[connection]
                connection.close()

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        """The first words are token and rank; then comes a verdict, or the end."""
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(1 << 16)
        rank = self._ranks.get(connection)
        if rank is None and len(data) >= 20 and secrets.compare_digest(data[:16], self._token):
            rank, data = int.from_bytes(data[16:20], "big"), data[20:]
            del self._strangers[connection]
            self._ranks[connection] = rank
            if not data:
                return
        verdict = unpack_verdict(data)
        if rank is not None and (verdict is not None or not data):
            self._on_verdict(verdict or lost_in_set_up(rank))
        selector.unregister(connection)
        self._ranks.pop(connection, None)
        self._strangers.pop(connection, None)
        connection.close()


def answer_roll_call(store: dist.Store, world: World, timeout: float) -> socket.socket | None:
    """The other ranks' side: a connection on which rank 0 tells why the run is over, and is told.

    None: rank 0 could not be reached, and only the start timeout watches this process's set-up from other machines.
    """
    try:
        await_keys(store, [_KEY], timeout)
        place = json.loads(store.get(_KEY))
    except RuntimeError:
        return None  # the next question to the store says what is wrong
    with contextlib.suppress(OSError):
        connection = _connect(place)
        connection.sendall(bytes.fromhex(place["token"]) + world.rank.to_bytes(4, "big"))
        return connection
    return None


def _listen(world: World) -> tuple[socket.socket, Path | None, dict[str, Any]]:
    """Rank 0's socket, its name in the file system if it has one, and where the others find it."""
    folder = meeting_folder()
    if folder is not None:
        path = folder / _KEY
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(world.size)
        return listener, path, {"path": str(path)}
    host = listening_host(world)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=world.size)
    return listener, None, {"host": meeting_host(world), "port": listener.getsockname()[1]}


def _connect(place: dict[str, Any]) -> socket.socket:
    if "path" not in place:
        return socket.create_connection((place["host"], place["port"]), timeout=_CONNECT_SECONDS)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_CONNECT_SECONDS)
    connection.connect(place["path"])
    return connection
