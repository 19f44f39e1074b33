"""Orderly stops: SIGINT and SIGTERM ask the run to finish the micro-batches in hand, report and leave."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]


_SAME_REQUEST = 2.0


class StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; one that comes later acts as usual.

    Launchers pass a signal on that the terminal has sent to all processes already, so whatever comes within
    `_SAME_REQUEST` seconds of the first counts as the same request.

    `notify` is called from the handler, in the main thread. Outside the main thread nothing is installed.

    Args:
        previous: the handlers to put back where those that are installed now are not to come back.
    """

    def __init__(
        self, notify: Callable[[int], None] | None = None, *, previous: Mapping[int, Any] | None = None
    ) -> None:
        self.received: int | None = None
        self._notify = notify
        self._previous: dict[int, Any] = dict(previous or {})
        self._since = 0.0

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous.setdefault(number, signal.signal(number, self._handle))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """After a failure SIGTERM is put off for a moment: a launcher sends it because another worker died, and this
        process is about to say why."""
        before = self._previous.get(signal.SIGTERM)
        self._restore()
        if kind is not None and before is not None:
            with contextlib.suppress(ValueError):  # not in the main thread: nothing was installed
                signal.signal(signal.SIGTERM, _put_off(before))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number, now
            if self._notify is not None:
                self._notify(number)
        elif now - self._since > _SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        with contextlib.suppress(ValueError):
            for number, handler in self._previous.items():
                signal.signal(number, handler)
        self._previous.clear()


def _put_off(before: Any) -> Callable[[int, FrameType | None], None]:
    """A handler by which a signal comes to `before` once `_SAME_REQUEST` seconds are over."""
    ends = time.monotonic() + _SAME_REQUEST

    def handle(number: int, frame: FrameType | None) -> None:
        left = ends - time.monotonic()
        if left > 0:
            again = threading.Timer(left, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            signal.signal(number, before)
            signal.raise_signal(number)

    return handle
