"""Who is there before the coordinator knows everybody: a connection from every rank to rank 0, held until the end.

A worker says hello to the coordinator once it knows its layers. One that dies before that (while rank 0 measures costs,
say) would be missed only by the start timeout; here the end of its connection tells at once.
"""

import contextlib
import json
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from unlocked.runtime.engines.processes.rendezvous import World

__all__ = ["RollCall", "answer_roll_call"]

_CONNECT_SECONDS = 5.0
_KEY = "roll-call"


class RollCall:
    """Rank 0's side. Use: construct, `release` when the coordinator has all hellos.

    Args:
        on_lost: called in a thread with the rank of a process that has answered and ended since.
    """

    def __init__(self, store: dist.Store, world: World, on_lost: Callable[[int], None]) -> None:
        self._on_lost = on_lost
        self._token = secrets.token_bytes(16)  # an open port hears strangers as well
        self._listener = socket.create_server(("127.0.0.1" if world.is_local else "", 0), backlog=world.size)
        self._ranks: dict[socket.socket, int | None] = {}
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="roll-call", daemon=True)
        host = "127.0.0.1" if world.is_local else world.master_address
        place = {"host": host, "port": self._listener.getsockname()[1], "token": self._token.hex()}
        store.set(_KEY, json.dumps(place, allow_nan=False))
        self._thread.start()

    def release(self) -> None:
        """From now on a process that ends is the coordinator's business. Idempotent."""
        self._wake.close()
        self._thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            released = False
            while not released:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        released = True
                    elif key.fileobj is self._listener:
                        connection, _ = self._listener.accept()
                        connection.settimeout(_CONNECT_SECONDS)
                        self._ranks[connection] = None
                        selector.register(connection, selectors.EVENT_READ)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hear(selector, key.fileobj)
        for connection in (*self._ranks, self._listener, self._woken):
            connection.close()

    def _hear(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        """The first words are token and rank; the next event is the end."""
        data = b""
        with contextlib.suppress(OSError):
            data = connection.recv(64)
        rank = self._ranks[connection]
        if rank is None and len(data) > 16 and secrets.compare_digest(data[:16], self._token):
            self._ranks[connection] = int.from_bytes(data[16:], "big")
            return
        selector.unregister(connection)
        del self._ranks[connection]
        connection.close()
        if rank is not None and not data:
            self._on_lost(rank)


def answer_roll_call(store: dist.Store, world: World, timeout: float) -> socket.socket | None:
    """The other ranks' side. Keep what it returns until the run is over; None: rank 0 could not be reached, and only
    the start timeout watches this process's set-up."""
    try:
        store.wait([_KEY], timedelta(seconds=timeout))
        place = json.loads(store.get(_KEY))
    except RuntimeError:
        return None  # the next question to the store says what is wrong
    with contextlib.suppress(OSError):
        connection = socket.create_connection((place["host"], place["port"]), timeout=_CONNECT_SECONDS)
        connection.sendall(bytes.fromhex(place["token"]) + world.rank.to_bytes(4, "big"))
        return connection
    return None
