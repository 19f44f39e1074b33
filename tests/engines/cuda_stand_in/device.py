"""The device that the stand-in is: streams and events with CUDA's order and CUDA's rules.

Work is done when it is issued, which is one of the orders that a device may choose. Whether others would give the same
is what the accesses' order tells (`order.py`).
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from cuda_stand_in.memory import Block, Memory
from cuda_stand_in.order import Moment, Order

__all__ = ["Device", "Event", "Stream"]

_OWN = ("cuda_stand_in", "/torch/", "contextlib.py")
_LATENESS = 2  # times that a query says "not yet" about work that the host has not waited for


class Device:
    """One device, whatever its index, and the host in front of it.

    Args:
        removed: waits that are left out, by the names that `waits` has.
        strict: see `Order`.

    Attributes:
        waits: how often each wait was asked for: `kind: function < its caller`, with `in a graph` inside of a capture.
        host_waits: those of them in which the host waits for the device, reads of its values included.
        order: who accessed what after what.
        launches, operations: graphs launched, and operations on the device outside of their launches, so far.
        uuid, count: the device's name, and how many devices there seem to be.
        opens: whether memory and events that a process shows can be opened by another (threads stand for processes).
        most_ahead: graphs of many streams that were launched before the host knew that the first of them had begun.
    """

    def __init__(self, removed: Iterable[str] = (), *, strict: bool = False) -> None:
        self.removed = frozenset(removed)
        self.uuid, self.count = "GPU-0", 2
        self.opens = True
        self._exported: dict[bytes, Any] = {}
        self.memory, self.order = Memory(), Order(strict=strict)
        self.waits: Counter[str] = Counter()
        self.host_waits: Counter[str] = Counter()
        self.launches = self.operations = self.most_ahead = 0
        self.selected = 0
        self._unfinished: dict[Stream, list[Moment]] = {}
        self.lock = threading.RLock()
        # One agent for all threads of the host: what orders those among each other is not looked at.
        self.host = self.order.agent("host")
        self.streams: list[Stream] = []
        self.default = Stream(self, "default stream")
        self._local = threading.local()
        self._pools = 0

    def select(self, which: Any) -> None:
        """As torch.cuda.set_device; whatever is selected, there is one device."""
        self.selected = torch.device(which).index or 0

    @property
    def current(self) -> "Stream":
        """The calling thread's current stream."""
        return getattr(self._local, "current", self.default)

    @current.setter
    def current(self, stream: "Stream") -> None:
        self._local.current = stream

    @property
    def capture(self) -> Any:
        """The capture that the calling thread has begun, or None."""
        return getattr(self._local, "capture", None)

    @capture.setter
    def capture(self, capture: Any) -> None:
        self._local.capture = capture

    def export(self, what: Any) -> bytes:
        """The handle by which another process opens a tensor's memory, or an event."""
        with self.lock:
            handle = len(self._exported).to_bytes(8, "big")
            self._exported[handle] = what
            return handle

    def open(self, handle: bytes) -> Any:
        if not self.opens:
            raise RuntimeError("CUDA error: invalid resource handle")
        return self._exported[handle]

    def new_pool(self) -> tuple[int, int]:
        self._pools += 1
        return (0, self._pools)

    def home(self) -> Any:
        """Where a block comes from that is allocated now."""
        stream = self.current
        pool = None if stream.capture is None else stream.capture.pool
        return (pool, stream.index)

    def is_removed(self, kind: str, *, captured: bool = False, host: bool = False) -> bool:
        """Whether a wait is left out; counts it. Those that torch asks for by itself stay."""
        by_torch, site = _site(sys._getframe(2))
        name = f"{kind}{' by torch' if by_torch else ''}{' in a graph' if captured else ''}: {site}"
        self.waits[name] += 1
        if host:
            self.host_waits[name] += 1
        return name in self.removed and not by_torch

    def forbid_in_capture(self, what: str) -> None:
        """What would touch more than the streams that are captured breaks the capture of the calling thread."""
        if self.capture is not None:
            self.capture.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def host_waits_for(self, streams: Iterable["Stream"]) -> None:
        for stream in streams:
            self.learn(stream.agent.release())

    def learn(self, moment: Moment) -> None:
        """The host knows now that this has happened."""
        self.host.acquire(moment)
        self.host.clock[0] += 1

    def synchronize(self) -> None:
        with self.lock:
            self.forbid_in_capture("synchronize")
            if not self.is_removed("synchronize", host=True):
                self.host_waits_for(self.streams)

    def read_by_host(self, what: str) -> None:
        """The host reads a value of the device: it waits for the current stream."""
        self.forbid_in_capture(what)
        self.is_removed(what, host=True)
        self.host_waits_for([self.current])

    def begin(self, stream: "Stream") -> None:
        """Work is issued to the stream: it comes after all that the host has done."""
        host = self.host
        if stream.seen_host != host.clock[0]:
            stream.agent.acquire(Moment(host.clock, 0.0))
            stream.seen_host = host.clock[0]

    def launched(self, stream: "Stream", *, of_many: bool) -> None:
        """A graph is launched: `of_many` streams, or of one."""
        self.launches += 1
        if not of_many:
            return
        earlier = self._unfinished.setdefault(stream, [])
        earlier[:] = [moment for moment in earlier if not self.host.is_after(moment)]
        earlier.append(stream.agent.release())
        self.most_ahead = max(self.most_ahead, len(earlier))

    def host_accesses(self, block: Block, what: str, *, write: bool) -> None:
        (self.order.write if write else self.order.read)(self.host, block.accesses, what)
        self.host.clock[0] += 1


class Stream:
    """In the place of torch.cuda.Stream."""

    def __init__(self, device: Device, name: str) -> None:
        self._device, self.index = device, len(device.streams)
        self.agent = device.order.agent(name)
        self.seen_host = -1
        self.capture: Any = None
        device.streams.append(self)

    @property
    def cuda_stream(self) -> int:
        return self.index

    def wait_event(self, event: "Event") -> None:
        with self._device.lock:
            captured = self.capture is not None or event.captured is not None
            if not self._device.is_removed("wait_event", captured=captured):
                self._wait(event)

    def wait_stream(self, stream: "Stream") -> None:
        with self._device.lock:
            captured = self.capture is not None or stream.capture is not None
            if not self._device.is_removed("wait_stream", captured=captured):
                event = Event(self._device)
                event.record(stream)
                self._wait(event)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event(self._device)
        event.record(self)
        return event

    def query(self) -> bool:
        self._device.forbid_in_capture("query")
        return self._device.host.is_after(Moment(self.agent.clock, 0.0))

    def synchronize(self) -> None:
        with self._device.lock:
            if self.capture is not None:
                self.capture.broken = True
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing (synchronize)")
            if not self._device.is_removed("synchronize", host=True):
                self._device.host_waits_for([self])

    def _wait(self, event: "Event") -> None:
        if event.captured is not None:
            event.captured[0].wait(self, event.captured[1])
        elif event.moment is not None:
            if self.capture is not None:
                self.capture.broken = True
                raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
            self.agent.acquire(event.moment)


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(
        self,
        device: Device,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        self._device, self._timed, self._external, self._shown = device, enable_timing, external, interprocess
        self.moment: Moment | None = None
        self.captured: tuple[Any, int] | None = None
        self._asked = 0

    def record(self, stream: Stream | None = None) -> None:
        with self._device.lock:
            stream = stream or self._device.current
            if stream.capture is None:
                self._device.begin(stream)
                self.happened(stream.agent.release())
            elif self._external:
                stream.capture.record_external(stream, self)
            else:
                self.moment, self.captured = None, (stream.capture, stream.capture.record(stream))

    def happened(self, moment: Moment) -> None:
        self.moment, self.captured, self._asked = moment, None, 0

    def ipc_handle(self) -> bytes:
        if not self._shown or self._timed:
            raise RuntimeError("CUDA error: invalid resource handle")
        return self._device.export(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._device.current).wait_event(self)

    def query(self) -> bool:
        """Says "not yet" a few times, and then that it has happened, which orders the host after it."""
        with self._device.lock:
            self._require_uncaptured("query")
            self._device.forbid_in_capture("query")
            if self.moment is None or self._device.host.is_after(self.moment):
                return True
            self._asked += 1
            if self._device.is_removed("query"):
                return True
            if self._asked <= _LATENESS:
                return False
            self._device.learn(self.moment)
            return True

    def synchronize(self) -> None:
        with self._device.lock:
            self._require_uncaptured("synchronize")
            self._device.forbid_in_capture("synchronize")
            if not self._device.is_removed("synchronize", host=True) and self.moment is not None:
                self._device.learn(self.moment)

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds of simulated time. Both must have happened, as far as the host can know."""
        for event in (self, end):
            if not event._timed:
                raise ValueError("both events must be created with enable_timing=True")
            event._require_uncaptured("elapsed_time")
            if event.moment is None or not self._device.host.is_after(event.moment):
                self._device.order.object_to("host: elapsed_time reads an event that may not have happened")
        assert self.moment is not None
        assert end.moment is not None
        return (end.moment.time - self.moment.time) / 1e3

    def _require_uncaptured(self, what: str) -> None:
        if self.captured is not None:
            self.captured[0].broken = True
            raise RuntimeError(f"CUDA error: operation not permitted on an event last recorded in a capture ({what})")


def _site(frame: FrameType | None) -> tuple[bool, str]:
    """Whether torch's own code asks; and the innermost lines outside of it and of the stand-in, by their functions."""
    found: list[str] = []
    by_torch: bool | None = None
    while frame is not None and len(found) < 3:
        code = frame.f_code
        if "/torch/" in code.co_filename and by_torch is None:
            by_torch = True
        elif not any(part in code.co_filename for part in _OWN):
            by_torch = bool(by_torch)
            found.append(f"{code.co_qualname.replace('<locals>.', '')}:{frame.f_lineno - code.co_firstlineno}")
        frame = frame.f_back
    return bool(by_torch), " < ".join(found)
