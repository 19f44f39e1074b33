"""Where a stage's workers come from: a process that has everything ready and does nothing but fork them.

It is forked from the supervisor once all that workers need is in memory (code, network, data, edges), and has a single
thread and nothing running, so that a worker forked from it begins as the first one did, within milliseconds, and with
the same state of every generator. Whoever started the zygote is its life: it ends with the supervisor, however that
ends, and a worker with the zygote.
"""

import contextlib
import ctypes
import json
import math
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from unlocked.runtime.control.ending import forget_acts

__all__ = ["CAN_FORK", "Ended", "Told", "WorkerLine", "Zygote", "how_it_ended"]

CAN_FORK = sys.platform == "linux"
"""Workers are tied to their parents by what only Linux has."""
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None)
_LARGEST = 1 << 16  # bytes of one message
_LEAVE_SECONDS = 2.0  # that it may take to leave with its worker
_LAST_SECONDS = 1.0  # the same, where its supervisor ends at once
_FAVOURITE = "500"  # for the kernel's killer when memory is short: a worker can be replaced, its supervisor can't


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker is gone."""

    incarnation: int
    status: int
    """As `os.waitstatus_to_exitcode` gives it: negative for a signal."""


@dataclass(frozen=True, slots=True)
class Told:
    """A worker has said something."""

    incarnation: int
    what: str
    content: dict[str, Any]


class WorkerLine:
    """A worker's way to its supervisor."""

    def __init__(self, incarnation: int, line: socket.socket, go: socket.socket) -> None:
        self.incarnation = incarnation
        self._line, self._go = line, go

    def tell(self, what: str, **content: Any) -> None:
        """One short message, of JSON values."""
        self._line.send(_packed(what=what, incarnation=self.incarnation, content=content))

    def await_go(self) -> None:
        """Until the supervisor says `go`; a later incarnation finds that it has."""
        _readable([self._go.fileno()])


class Zygote:
    """The supervisor's side. Use: construct, `start`, `events`, `close`.

    Args:
        work: what a worker does, in a process of its own that ends when this returns; it must not raise.
    """

    def __init__(self, work: Callable[[WorkerLine], object]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line, workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._go, await_go = socket.socketpair()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child uses nothing that they hold
            supervisor, self._pid = os.getpid(), os.fork()
        if self._pid == 0:
            for end in (self._orders, self._line, self._go):
                end.close()
            _be_zygote(supervisor, theirs, lambda n: work(WorkerLine(n, workers, await_go)))
        for end in (theirs, workers, await_go):
            end.close()
        self._line.setblocking(False)
        self._ordered = math.inf  # when a worker was asked for that has not been started yet
        self.is_there = True
        """False once it has been given up."""

    def descriptors(self) -> list[int]:
        """Readable when there may be `events`."""
        return [self._orders.fileno(), self._line.fileno()] if self._pid and self.is_there else []

    def start(self, incarnation: int) -> None:
        """Ends whatever worker there is and starts the next one. Returns at once."""
        self._ordered = min(self._ordered, time.monotonic())  # the first of the orders that it has not followed
        self._order("start", incarnation)

    def stands_still(self, seconds: float) -> bool:
        """Whether it has not started a worker within so many seconds of the order."""
        return self.is_there and time.monotonic() - self._ordered > seconds

    def give_up(self) -> None:
        """Nothing is expected of it any more."""
        self.is_there = False

    def end_worker(self) -> None:
        """Kills the worker, if there is one. Returns at once."""
        self._order("kill", -1)

    def say_go(self) -> None:
        """To this worker and to all that will come."""
        with contextlib.suppress(OSError):
            self._go.send(b"\1")

    def events(self, timeout: float) -> list[Ended | Told]:
        """What has happened, in order; waits for it up to `timeout` seconds.

        Raises:
            ChildProcessError: the zygote itself is gone.
        """
        if not self.is_there:
            time.sleep(timeout)
            return []
        ready = _readable(self.descriptors(), timeout)
        found: list[Ended | Told] = []
        ended = self._orders.fileno() in ready
        # What a worker has said comes before its end.
        message = self._orders.recv(_LARGEST) if ended else b""
        with contextlib.suppress(BlockingIOError):
            while data := self._line.recv(_LARGEST):
                words = json.loads(data)
                found.append(Told(words["incarnation"], words["what"], words["content"]))
        if ended:
            if not message:
                raise ChildProcessError("the process that starts this stage's workers is gone")
            words = json.loads(message)
            if words["what"] == "started":
                self._ordered = math.inf
            else:
                found.append(Ended(words["incarnation"], words["content"]["status"]))
        return found

    def close(self) -> None:
        """Ends the zygote and its worker, and waits for that. Idempotent."""
        if not self._pid:
            return
        self._orders.close()  # it kills its worker and leaves
        with contextlib.suppress(ChildProcessError):
            if not _has_ended(self._pid, _LEAVE_SECONDS):  # it stands still; the kernel ends its worker with it
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._pid = 0
        self._line.close()
        self._go.close()

    def let_go(self) -> None:
        """The zygote ends its worker and leaves, which is waited for a little. From any thread, as the last act of a
        process that ends: the kernel would end a worker with it too, but for one that was stopped as it began."""
        with contextlib.suppress(OSError):
            self._orders.shutdown(socket.SHUT_RDWR)
            if self._pid:
                _has_ended(self._pid, _LAST_SECONDS)

    def _order(self, what: str, incarnation: int) -> None:
        with contextlib.suppress(OSError):  # it is gone: `events` says so
            self._orders.send(_packed(what=what, incarnation=incarnation, content={}))


def how_it_ended(status: int) -> str:
    """In words, for "its worker ...": a status as `Ended` has it."""
    if status >= 0:
        return f"left with exit code {status} and without a word"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _packed(**content: Any) -> bytes:
    return json.dumps(content, allow_nan=False).encode()


def _be_zygote(supervisor: int, orders: socket.socket, work: Callable[[int], object]) -> NoReturn:
    """Serves orders until the supervisor closes the line, or ends."""
    try:
        _end_with(supervisor)
        forget_acts()
        _leave_signals()
        worker = None
        while True:
            ready = _readable([orders.fileno()] if worker is None else [orders.fileno(), worker.handle])
            if worker is not None and worker.handle in ready:
                worker.report(orders)
                worker = None
            if orders.fileno() in ready:
                words = json.loads(orders.recv(_LARGEST) or b'{"what": "end"}')
                if worker is not None:
                    os.kill(worker.pid, signal.SIGKILL)
                    worker.report(orders)
                    worker = None
                if words["what"] == "end":
                    os._exit(0)
                if words["what"] == "start":
                    worker = _Worker(words["incarnation"], orders, work)
                    orders.send(_packed(what="started", incarnation=words["incarnation"], content={}))
    finally:
        os._exit(1)


class _Worker:
    """The zygote's child."""

    def __init__(self, incarnation: int, orders: socket.socket, work: Callable[[int], object]) -> None:
        self.incarnation = incarnation
        zygote, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            try:
                _end_with(zygote)
                _leave_signals()
                _be_first_to_go()
                orders.close()
                work(incarnation)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            finally:
                os._exit(1)
        self.handle = os.pidfd_open(self.pid)

    def report(self, orders: socket.socket) -> None:
        """Waits for its end and tells the supervisor."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.handle)
        with contextlib.suppress(OSError):
            content = {"status": os.waitstatus_to_exitcode(status)}
            orders.send(_packed(what="ended", incarnation=self.incarnation, content=content))


def _end_with(parent: int) -> None:
    """The kernel kills this process when the one that has forked it ends."""
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _has_ended(child: int, seconds: float) -> bool:
    """Whether it ends within so many seconds; it stays to be waited for."""
    handle = os.pidfd_open(child)
    try:
        return bool(_readable([handle], seconds))
    finally:
        os.close(handle)


def _be_first_to_go() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_FAVOURITE)


def _leave_signals() -> None:
    """A terminal sends its signals to all processes: the supervisor acts on them for its worker too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that a worker starts would inherit


def _readable(descriptors: list[int], timeout: float | None = None) -> set[int]:
    """Those with something to read, after `timeout` seconds at most; unlike `select.select`, also above 1023."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if timeout is None else 1000 * timeout)}
