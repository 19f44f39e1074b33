"""How other threads and signal handlers reach a thread that waits on sockets."""

import contextlib
import socket
from collections import deque
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """A queue into an event loop: `put` from any thread or signal handler, wake the loop through a file descriptor."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()  # its append and popleft are atomic, also under a signal handler
        # Socket objects, not bare pipe descriptors: sending on a closed object fails cleanly, whereas a closed
        # descriptor's number may already belong to somebody else's file.
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def put(self, item: Any) -> None:
        """Never blocks; after `close` it does nothing."""
        self._items.append(item)
        with contextlib.suppress(OSError):  # full: the loop wakes anyway; closed: there is no loop
            self._writer.send(b"\0")

    def drain(self) -> list[Any]:
        """All items put so far, in order."""
        with contextlib.suppress(OSError):
            self._reader.recv(65536)
        items = []
        while self._items:
            items.append(self._items.popleft())
        return items

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
