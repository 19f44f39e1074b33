"""Waiting for a process group's messages in a thread that can be left behind."""

import contextlib
import queue
import threading
from datetime import timedelta
from enum import Enum
from typing import Any

__all__ = ["Waiter", "Word"]


class Word(Enum):
    """What a waiter says."""

    DONE = 0
    """Another message has come, or gone."""
    FAILED = 1
    """No more will."""
    LOOK = 2
    """Something else has happened."""


class Waiter:
    """Waits for the messages of one group, in their order, in a thread of its own, which can be left behind: where the
    other process dies while a message is half written or half read, Gloo wakes nobody (`Pair::signalException` in its
    tcp/pair.cc passes over unbound buffers of operations under way), and the wait lasts until its timeout."""

    def __init__(self, group: Any, timeout: timedelta) -> None:
        self._group, self._timeout = group, timeout  # a group must outlast its messages
        self._works: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._words: queue.SimpleQueue[Word] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="waiter", daemon=True).start()

    def add(self, work: Any) -> None:
        """The next message's."""
        self._works.put(work)

    def next_word(self, seconds: float) -> Word | None:
        """None: nothing in so long."""
        try:
            return self._words.get(timeout=seconds)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Says LOOK; from any thread."""
        self._words.put(Word.LOOK)

    def close(self) -> None:
        """There are no more messages. Does not wait."""
        self._works.put(None)

    def _run(self) -> None:
        try:
            with contextlib.suppress(RuntimeError):
                while (work := self._works.get()) is not None:
                    work.wait(self._timeout)
                    self._words.put(Word.DONE)
        finally:
            self._words.put(Word.FAILED)
