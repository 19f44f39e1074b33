"""All stages in one process on one device: a stream per stage, ring buffers between them, CUDA graphs over ticks.

In tick t stage k works on the micro-batch at stream position t - k. Ticks are the order in which the host issues work;
on the GPU only the true dependences order it (a slot is written before it is read, and read before it is written
again), so stages drift within the rings' depth. A run of uniform training ticks is replayed as one recording; what
lies between (a partial micro-batch, evaluation, the seam of an epoch) is issued stage by stage, from recordings of each
kind. Recordings are CUDA graphs; on a CPU they are the calls themselves, made again in the same order, one after the
other.
"""

import contextlib
import time
import warnings
from collections import deque

import torch

from unlocked.models import LinearBlock, OutputBlock
from unlocked.runtime.engines.one_process import LocalOutlet, finish_result, locate, write_stage_snapshot
from unlocked.runtime.engines.streams.green import make_streams
from unlocked.runtime.engines.streams.tape import Block, record
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.signals import StopSignals
from unlocked.workers.lane import Lane
from unlocked.workers.ring import Ring
from unlocked.workers.stamps import DeviceClock, EventMarks, HostMarks
from unlocked.workers.stopwatch import Recorder

__all__ = ["StreamsEngine"]

_BLOCKS_AHEAD = 3  # blocks that the host may issue ahead of the device
# Without blocks and without a trace, the actions of so many ticks out of so many are timed.
_SAMPLED_TICKS, _SAMPLE_EVERY = 32, 256


class StreamsEngine:
    """Runs a job on one device.

    Args:
        max_stages: at most that many stages, whatever the settings say (1: the plain loop, in graphs).
    """

    def __init__(self, max_stages: int | None = None) -> None:
        self._max_stages = max_stages

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        with contextlib.ExitStack() as stack:
            if job.device.type == "cuda":
                stack.enter_context(torch.cuda.device(job.device))
                torch.cuda.reset_peak_memory_stats(job.device)
            began = time.perf_counter()
            run = _Run(job, make_sinks, self._max_stages)
            stack.callback(run.close)
            run.prepare()
            setup = time.perf_counter() - began
            with StopSignals() as signals:
                seconds = run.train(signals)
            return run.finish(seconds, setup, signals.received)


class _Run:
    """One run's lanes and what they have done so far."""

    def __init__(self, job: Job, make_sinks: SinkMaker, max_stages: int | None) -> None:
        self.job, self.device, self.plan = job, job.device, job.plan
        self.parts = _partition(job, max_stages)
        self.streams, self._contexts = make_streams(job.settings.green_contexts, job.device, len(self.parts))
        self.lanes = _build_lanes(job, self.parts, self.streams)
        if job.settings.resume is not None:
            for lane in self.lanes:
                load_layers(job.settings.resume, lane.stage.layers)
        self.fan_out = FanOut(make_sinks())
        self.outlet = LocalOutlet(self.fan_out, len(self.lanes), job.lr_factor)
        self.fan_out.on_start(job.run_info(self.parts))
        self.traced = job.settings.trace is not None
        self.recorders = [Recorder(keep=self.traced) for _ in self.lanes]
        self.reporters = [
            StageReporter(
                lane.stage,
                job.plan,
                recorder,
                self.outlet,
                lr_factor=job.lr_factor,
                print_freq=job.settings.print_freq,
                start=job.start,
                waits_for_losses=job.lr_factor.needs_losses,
                best_dir=job.settings.best_dir,
            )
            for lane, recorder in zip(self.lanes, self.recorders, strict=True)
        ]
        self.recorded = job.settings.graphs and self._capturable()
        self.block: Block | None = None
        self.clock: DeviceClock | None = None
        self.events: EventMarks | None = None
        self._issued: deque[torch.cuda.Event] = deque()
        self._first, self._end = job.start, len(job.plan)  # of the part of the stream that is under way

    def prepare(self) -> None:
        """Makes the recordings after a warm-up whose effects are undone, and waits for everything that was begun."""
        if self.recorded:
            self.block = record(self.job, self.lanes, timed=self.traced)
        # Streams of the pool don't wait for the default one, on which layers, data and rings were made.
        self._synchronize()

    def train(self, signals: StopSignals) -> float:
        """Issues every tick; returns the seconds until the device had done them."""
        for recorder in self.recorders:
            recorder.restart()
        self._begin_marks()
        began = time.perf_counter()
        try:
            for first, end in self.job.segments():
                self._first, self._end = first, end
                self._run_segment(signals)
                if signals.received is not None:
                    break
            self._synchronize()
        except BaseException:
            # Nobody may free or reuse what the device still works on. If that is what failed, the cause is on its way.
            with contextlib.suppress(RuntimeError):
                self._synchronize()
            raise
        seconds = time.perf_counter() - began
        self._collect(wait=True)
        return seconds

    def _run_segment(self, signals: StopSignals) -> None:
        """Fills the pipeline, runs it, drains it."""
        tick, lag = self._first, len(self.lanes) - 1
        while tick < self._end + lag:
            if signals.received is not None:
                self._end = min(self._end, tick)  # what stage 0 has begun flows through, nothing new enters
                if tick >= self._end + lag:
                    break
            ticks = self._uniform_ticks(tick)
            if ticks:
                self._replay_block(tick)
            else:
                self._sample(tick)
                self._issue(tick)
            tick += ticks or 1
            for reporter in self.reporters:
                reporter.poll()
        for reporter in self.reporters:  # what the next segment's learning rate may depend on
            reporter.poll(wait=True)

    def close(self) -> None:
        for lane in self.lanes:
            lane.stage.close()

    def finish(self, seconds: float, setup: float, stopped_by: int | None) -> RunResult:
        if self.clock is not None:
            busy = self.clock.busy_fraction(seconds)
        else:
            busy = [recorder.busy / max(seconds, 1e-9) for recorder in self.recorders]
        if self.job.settings.trace is not None:
            rows = {k: f"stage {k}: {', '.join(lane.stage.layer_names)}" for k, lane in enumerate(self.lanes)}
            spans = [span for recorder in self.recorders for span in recorder.spans]
            write_chrome_trace(self.job.settings.trace, spans, rows)
        return finish_result(
            self.job,
            [lane.stage for lane in self.lanes],
            self.outlet,
            position=self._end,
            images=self.reporters[0].images,
            train_seconds=seconds,
            setup_seconds=setup,
            busy_fraction=busy,
            stopped_by=stopped_by,
        )

    def _issue(self, tick: int) -> None:
        """One tick, stage by stage. Later stages first: they read a slot before the stage before them refills it."""
        # A trace shows F and U apart, and a stage's graph holds no marks: these ticks are then issued plainly.
        recorded = self.recorded and not (self.traced and self.device.type == "cuda")
        for k, lane in reversed(list(enumerate(self.lanes))):
            position = tick - k
            if not self._first <= position < self._end:
                continue
            item = self.plan[position]
            with lane.on_stream():
                self.reporters[k].before(item)
                try:
                    lane.issue(item, recorded=recorded)
                    if item.kind == "snapshot":
                        lane.tell("SNAP", item)
                        write_stage_snapshot(self.job, lane.stage, item, last=k == len(self.lanes) - 1)
                        lane.tell("end", item)
                except (ValueError, RuntimeError) as error:
                    raise locate(error, lane.stage, item) from error
                self.reporters[k].after(item)

    def _uniform_ticks(self, tick: int) -> int:
        """The block's ticks if all of its micro-batches are full ones of one epoch, past its first and before its last
        (where there are sums to begin and to report); else 0."""
        block = self.block
        if block is None or tick % block.alignment:
            return 0
        first, last = tick - len(self.lanes) + 1, tick + block.ticks - 1
        if first <= self._first or last >= self._end:
            return 0  # every stage's first micro-batch here is issued by itself: its learning rate is set before it
        a, b = self.plan[first], self.plan[last]
        uniform = a.kind == b.kind == "train" and a.epoch == b.epoch and a.index > 0 and not b.last
        return block.ticks if uniform and b.index - a.index == last - first and b.size == self.plan.batch_size else 0

    def _replay_block(self, tick: int) -> None:
        block = self.block
        assert block is not None
        if self.events is not None:
            self.events.cut()
        block.replay(self.plan[tick])
        for k, (lane, reporter) in enumerate(zip(self.lanes, self.reporters, strict=True)):
            with lane.on_stream():
                reporter.skip(list(self.plan.items(tick - k, tick - k + block.ticks)))
        self._collect()
        if block.stream is not None:
            event = torch.cuda.Event()
            event.record(block.stream)
            self._issued.append(event)
            if len(self._issued) > _BLOCKS_AHEAD:
                self._issued.popleft().synchronize()

    def _begin_marks(self) -> None:
        """On a CPU every action is timed. On a GPU all are for a trace; else samples of the blocks, or of the ticks."""
        if self.device.type == "cpu":
            marks = HostMarks(self.recorders)
            for lane in self.lanes:
                lane.mark = marks
            return
        self.clock = DeviceClock(self.recorders, whole=self.traced)
        if self.block is not None:
            self.block.clock = self.clock
        if self.traced or self.block is None:
            self.events = EventMarks([stream for stream in self.streams if stream is not None], self.clock)
        if self.traced:
            for lane in self.lanes:
                lane.mark = self.events

    def _sample(self, tick: int) -> None:
        """Without blocks and without a trace: begins and ends the windows of ticks that are timed."""
        if self.events is None or self.traced:
            return
        since_start = tick - self.job.start
        timed = since_start % _SAMPLE_EVERY < _SAMPLED_TICKS
        if since_start % _SAMPLED_TICKS == 0:
            self.events.cut()
            self._collect()
        for lane in self.lanes:
            lane.mark = self.events if timed else None

    def _collect(self, *, wait: bool = False) -> None:
        """Takes in the times that have come from the device."""
        if self.clock is not None and self.block is not None:
            self.block.collect(wait=wait)
        if self.events is not None:
            if wait:
                self.events.cut()
            self.events.collect(wait=wait)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capturable(self) -> bool:
        if self.device.type == "cpu" or all(lane.is_capturable for lane in self.lanes):
            return True
        warnings.warn(
            "streams: no CUDA graphs, because an optimizer keeps state on the host; install triton for fused ones",
            stacklevel=2,
        )
        return False


def _partition(job: Job, max_stages: int | None) -> list[range]:
    layers, stages = len(job.network.blocks), job.settings.stages
    if max_stages == 1:
        return [range(layers)]
    count = layers if stages is None or isinstance(stages, str) else stages
    costs = [1.0] * layers
    if isinstance(stages, int) and stages < layers:
        costs = job.costs()
    return job.partition(costs, count)


def _build_lanes(job: Job, parts: list[range], streams: list[torch.cuda.Stream | None]) -> list[Lane]:
    plan, network, device = job.plan, job.network, job.device
    rings = []
    for k, part in enumerate(parts):
        shape = network.output_shapes[part.start - 1] if k else network.input_shape
        # Only these are known to flatten first: another flat layer may begin with a convolution.
        flat = isinstance(network.blocks[part.start], LinearBlock | OutputBlock)
        depth = job.settings.queue_depth if k else 1
        dtype = job.storage if k or network.input_dtype.is_floating_point else network.input_dtype
        rings.append(Ring(depth, plan.max_rows, shape, device, flat_consumer=flat and k > 0, dtype=dtype))
    outboxes = [*rings[1:], None]
    return [Lane(job.stage(k, part), rings[k], outboxes[k], streams[k]) for k, part in enumerate(parts)]
