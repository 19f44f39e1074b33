"""CUDA graphs of the stand-in: what is issued to captured streams is kept, not done, and then done by its addresses.

The rules are those of stream capture (CUDA C++ Programming Guide, "Stream Capture"): nothing from outside is waited
for, nothing inside is waited for from outside, every stream that joined is waited for at the end, and nothing that
would touch the whole device is called.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cuda_stand_in.device import Device, Event, Stream
from cuda_stand_in.memory import Block
from cuda_stand_in.order import Moment
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Capture", "Graph"]


class _Node(NamedTuple):
    """An operation: what runs it again, and what it reads and writes."""

    stream: Stream
    run: Callable[[], None]
    what: str
    reads: tuple[Block, ...]
    writes: tuple[Block, ...]


class _Record(NamedTuple):
    stream: Stream
    number: int
    external: Event | None


class _Wait(NamedTuple):
    stream: Stream
    number: int


class Capture:
    """What streams are given between `capture_begin` and `capture_end`.

    Attributes:
        broken: something forbidden was asked for; the capture can only end with an error.
        pool: where blocks come from meanwhile.
    """

    def __init__(self, device: Device, origin: Stream, pool: Any) -> None:
        self.device, self.origin, self.pool = device, origin, pool
        self.steps: list[_Node | _Record | _Wait] = []
        self.streams = [origin]
        self.broken = False
        self._saved: dict[Block, bytes] = {}
        self._made: set[Block] = set()
        # By stream: how many steps of each stream are before its next one; and the same for every record.
        self._before: dict[Stream, dict[Stream, int]] = {origin: {origin: 0}}
        self._records: list[dict[Stream, int]] = []

    def add(self, stream: Stream, run: Callable[[], None], what: str, reads: Any, writes: Any) -> None:
        self._before[stream][stream] += 1
        self.steps.append(_Node(stream, run, what, tuple(reads), tuple(writes)))

    def record(self, stream: Stream) -> int:
        self._records.append(self._before[stream].copy())
        self.steps.append(_Record(stream, len(self._records) - 1, None))
        return len(self._records) - 1

    def record_external(self, stream: Stream, event: Event) -> None:
        """At every launch, instead of drawing a dependence from it."""
        self._before[stream][stream] += 1
        self.steps.append(_Record(stream, -1, event))

    def wait(self, stream: Stream, number: int) -> None:
        """A stream waits for a record of this capture; one from outside joins it by that."""
        if self.origin.capture is not self or stream.capture not in (None, self):
            if stream.capture is not None:
                stream.capture.broken = True
            raise RuntimeError("CUDA error: operation not permitted on an event last recorded in a capturing stream")
        if stream.capture is None:
            stream.capture = self
            if stream not in self._before:
                self.streams.append(stream)
                self._before[stream] = {stream: 0}
        mine = self._before[stream]
        for other, count in self._records[number].items():
            mine[other] = max(mine.get(other, 0), count)
        self.steps.append(_Wait(stream, number))

    def keep(self, block: Block) -> None:
        """Before something writes to it: a capture does nothing, so what was there comes back at its end."""
        if block not in self._made and block not in self._saved:
            self._saved[block] = self.device.memory.content(block)

    def made(self, block: Block) -> None:
        self._made.add(block)

    def end(self) -> None:
        for stream in self.streams:
            stream.capture = None
        memory = self.device.memory
        for block, content in self._saved.items():
            memory.fill(block, content)
        for block in self._made:
            if block.is_float:  # integers may be addresses for what is captured next, and stay valid ones
                memory.spoil(block)
        self._saved.clear()
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        known = self._before[self.origin]
        if any(known.get(stream, 0) < self._before[stream][stream] for stream in self.streams):
            raise RuntimeError("CUDA error: capturing stream has unjoined work")


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self, device: Device, keep_graph: bool = False) -> None:
        self._device = device
        self._capture: Capture | None = None
        self._agents: dict[Stream, Any] = {}
        self._external: list[Event] = []
        self._is_whole = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        device, stream = self._device, self._device.current
        if stream is device.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        if stream.capture is not None or device.capture is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (capture_begin)")
        if self._capture is not None:
            raise RuntimeError("this graph has been captured already")
        self._capture = Capture(device, stream, pool or device.new_pool())
        stream.capture = device.capture = self._capture

    def capture_end(self) -> None:
        capture, device = self._capture, self._device
        if capture is None or device.current is not capture.origin:
            raise RuntimeError("Capture must end on the same stream it began on.")
        device.capture = None
        capture.end()
        self._is_whole = True
        if len(capture.streams) > 1:
            name = capture.origin.agent.name
            self._agents = {s: device.order.agent(f"{s.agent.name} in a graph of {name}") for s in capture.streams}

    def replay(self) -> None:
        device, stream = self._device, self._device.current
        with device.lock:
            if not self._is_whole:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            if stream.capture is not None:
                stream.capture.broken = True
                raise RuntimeError("CUDA error: a graph is launched in a capture")
            assert self._capture is not None
            device.begin(stream)
            device.launched(stream, of_many=bool(self._agents))
            with _disable_current_modes(), torch.no_grad():
                self._run(self._capture, stream)

    def reset(self) -> None:
        self._capture, self._is_whole = None, False

    def pool(self) -> Any:
        assert self._capture is not None
        return self._capture.pool

    def _run(self, capture: Capture, stream: Stream) -> None:
        """All branches begin after what the launching stream has done, and it goes on after all of them."""
        order = self._device.order
        agents = self._agents or {capture.origin: stream.agent}
        if self._agents:
            begin = stream.agent.release()
            for agent in agents.values():
                agent.acquire(begin)
        moments: dict[int, Moment] = {}
        for step in capture.steps:
            agent = agents[step.stream]
            if isinstance(step, _Node):
                for block in step.reads:
                    order.read(agent, block.accesses, step.what)
                for block in step.writes:
                    order.write(agent, block.accesses, step.what)
                agent.time += 1
                step.run()
            elif isinstance(step, _Wait):
                agent.acquire(moments[step.number])
            elif step.external is not None:
                step.external.happened(agent.release())
            else:
                moments[step.number] = agent.release()
        if self._agents:
            for agent in agents.values():
                stream.agent.acquire(agent.release())
