"""A thread that runs callbacks in order, so that a slow disk or terminal never delays the coordinator."""

import queue
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["CallbackThread"]

MAX_WAITING = 1000
"""Beyond this many waiting callbacks the lossy ones are dropped."""


class CallbackThread:
    """Runs posted callbacks one after another.

    Args:
        on_failure: called (in this thread) with the exception of a callback posted as important.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...], bool] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="coordinator-callbacks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, callback: Callable[..., object], *args: Any, lossy: bool = False, important: bool = False) -> None:
        """Queues `callback(*args)`. Exceptions are dropped, unless `important`."""
        if not lossy or self._queue.qsize() < MAX_WAITING:
            self._queue.put((callback, args, important))

    def drain(self, timeout: float) -> bool:
        """Waits until all that was posted before has run; False after `timeout` seconds."""
        done = threading.Event()
        self.post(done.set)
        return done.wait(timeout)

    def close(self, timeout: float = 5.0) -> None:
        """Runs what is queued, then ends the thread."""
        self._queue.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            callback, args, important = item
            try:
                callback(*args)
            except Exception as error:  # whatever it is, the thread must go on serving the others
                if important:
                    self._on_failure(error)
