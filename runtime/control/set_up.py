"""A process's set-up, which is as mortal as its run: a signal, a neighbour's death or the launcher's ends it at once.

The main thread may sit in an import, in a store's wait or in a kernel for seconds, so a thread watches and acts.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar, NoReturn

from unlocked.runtime.control.ending import Verdict, end_process, error_line
from unlocked.runtime.control.launcher import follow_launcher
from unlocked.runtime.control.presence import Presence, lost_in_set_up
from unlocked.runtime.control.world import World, stage_name

__all__ = ["SetUp", "pack_verdict", "unpack_verdict"]

LOOK_SECONDS = 0.2
"""Between two looks at the others of this machine."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LAST_WORDS_SECONDS = 2.0  # that a process which fails by itself may take to print why
_LINE_BYTES = 1 << 16  # what is said to end a run is shorter


class SetUp:
    """From `begin` to `done`: SIGINT and SIGTERM end this process at once with 130 or 143, another process's death
    with 1, or with the code that it left with on purpose; each with a line that says so.

    Signals are watched where `begin` is called in the main thread.
    """

    _current: ClassVar["SetUp | None"] = None
    _presences: ClassVar[dict[World, Presence | None]] = {}

    def __init__(self, world: World) -> None:
        self.world = world
        self._presence = self.join(world)
        follow_launcher(world.rank)
        self._tell: Callable[[Verdict], object] | None = None
        self._link: socket.socket | None = None
        self._left_word = False
        self._previous: dict[int, Any] = {}
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="set-up-watch", daemon=True)
        self._watch_signals()
        self._thread.start()

    @classmethod
    def join(cls, world: World) -> Presence | None:
        """From here on the others see this process's end, but it does not watch them yet. Idempotent.

        Raises:
            ValueError: another process lives that has this rank.
        """
        if world not in cls._presences:
            cls._presences[world] = Presence.join(world)
        return cls._presences[world]

    @classmethod
    def begin(cls, world: World) -> "SetUp":
        """This process's set-up, which may have begun already.

        Raises:
            ValueError: another process lives that has this rank.
        """
        if cls._current is None:
            cls._current = cls(world)
        return cls._current

    @property
    def is_over(self) -> bool:
        return SetUp._current is not self

    def link(self, connection: socket.socket | None, tell: Callable[[Verdict], object] | None = None) -> None:
        """Adds the way to the other machines' processes.

        Args:
            connection: to rank 0, whose verdict, or end, ends this process too.
            tell: sends a verdict on to those who can't see this machine's processes.
        """
        self._tell, self._link = tell, connection
        self._poke()

    def end(self, verdict: Verdict) -> NoReturn:
        """Ends this process, and has all others hear why. From any thread."""
        if self._left_word:  # it is about to end by itself, with a line of its own
            time.sleep(_LAST_WORDS_SECONDS)
        self.leave_word(verdict)
        end_process(verdict, error_line(self.world.rank, verdict.message))

    def leave_word(self, verdict: Verdict) -> None:
        """This process fails by itself and will end: the others are to say the same. Only the first word counts."""
        if self._left_word:
            return
        self._left_word = True
        if self._presence is not None:
            self._presence.leave_word(verdict)
        if self._tell is not None:
            with contextlib.suppress(OSError):
                self._tell(verdict)

    def await_verdict(self, seconds: float = 2.0) -> None:
        """Something broke that another process's end may have broken: gives the watch the time to find out, which
        ends this process."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    def hand_over_signals(self) -> dict[int, Any]:
        """The handlers that were there before, for whoever takes the signals over; those of the set-up stay until
        then."""
        previous, self._previous = self._previous, {}
        return previous

    def settle(self) -> None:
        """The run has begun: all processes have been here. Ends the set-up."""
        if self._presence is not None:
            self._presence.settle()
        self.done()

    def done(self) -> None:
        """Ends the set-up. Idempotent."""
        if self.is_over:
            return
        SetUp._current = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._signals_are_watched:
            signal.set_wakeup_fd(self._previous_wakeup)
        self._poke(b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._wake.close()
        self._woken.close()

    # --- the watch

    def _watch_signals(self) -> None:
        self._signals_are_watched = threading.current_thread() is threading.main_thread()
        if self._signals_are_watched:
            self._previous_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, _leave_to_watch)

    def _poke(self, byte: bytes = b"\xff") -> None:
        with contextlib.suppress(OSError):
            self._wake.send(byte)

    def _watch(self) -> None:
        heard = b""
        watched: socket.socket | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(LOOK_SECONDS)}
                orders = self._orders() if self._woken in ready else b""
                if 0 in orders:
                    return
                if self._link is not watched:
                    watched = self._link
                    if watched is not None:
                        selector.register(watched, selectors.EVENT_READ)
                loss = None if self._presence is None else self._presence.look()
                if loss is not None:
                    self.end(loss)
                for number in _SIGNALS:
                    if number in orders:
                        self.end(self._signalled(number))
                if watched is not None and watched in ready:
                    data = _read(watched)
                    heard += data
                    verdict = unpack_verdict(heard)
                    if verdict is not None:
                        self.end(verdict)
                    if not data:
                        self.end(lost_in_set_up(0))
                    if heard.endswith(STARTED):
                        selector.unregister(watched)
                        self._link = watched = None

    def _orders(self) -> bytes:
        with contextlib.suppress(OSError):
            return self._woken.recv(4096)
        return b""

    def _signalled(self, number: int) -> Verdict:
        name = signal.Signals(number).name
        return Verdict(f"{stage_name(self.world.rank)} was ended by {name} during set-up", 128 + number)


STARTED = b"started\n"
"""What rank 0 says when the run has begun: its silence is no death from then on."""


def pack_verdict(verdict: Verdict) -> bytes:
    """One line, for a connection."""
    return (json.dumps({"message": verdict.message, "code": verdict.code}, allow_nan=False) + "\n").encode()


def unpack_verdict(data: bytes) -> Verdict | None:
    """The first verdict among the lines heard so far."""
    for line in data.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            word = json.loads(line)
            return Verdict(str(word["message"]), int(word["code"]))
    return None


def _read(connection: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        return connection.recv(_LINE_BYTES)
    return b""


def _leave_to_watch(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor has told the watch, which does not depend on the main thread."""


def _be_a_child() -> None:
    """A forked child (a data loader's worker) takes signals as usual, and its parent does not hear of them."""
    current = SetUp._current
    if current is not None and current._signals_are_watched:
        signal.set_wakeup_fd(-1)
        for number, handler in current._previous.items():
            signal.signal(number, handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_a_child)
