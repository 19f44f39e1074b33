"""All stages in one process on one device: a stream per stage, ring buffers between them, CUDA graphs over ticks.

In tick t stage k works on the micro-batch at stream position t - k. Ticks are the order in which the host issues work;
on the GPU only the true dependences order it (a slot is written before it is read, and read before it is written
again), so stages drift within the rings' depth. What a stage does is the schedule's list, executed by the loop that
every engine runs. A run of uniform ticks, all of one kind, is launched as one captured piece; what lies between (a
partial micro-batch, the seams between kinds and epochs) is issued stage by stage, from captured pieces of each kind.
Captured work is a CUDA graph; on a CPU it is the calls themselves, made again in the same order, one after the other.
"""

import contextlib
import gc
import time
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from unlocked.models import LinearBlock, OutputBlock
from unlocked.runtime.engines.one_process import (
    LocalOutlet,
    finish_result,
    stop_position,
    threads_of,
    warn_of_threads,
)
from unlocked.runtime.engines.pipeline import AUTO, PipelineOptions
from unlocked.runtime.engines.saver import RunSaver, set_others_aside
from unlocked.runtime.engines.streams.green import GREEN_CONTEXTS, make_streams
from unlocked.runtime.engines.streams.tick_graph import TickGraph, capture
from unlocked.runtime.fields import setting
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.reporter import StageReporter, read_together
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.metrics.step_rates import set_rates_per_step
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.settings import Settings
from unlocked.runtime.signals import StopSignals
from unlocked.workers.actions import Item, ItemKind
from unlocked.workers.cargo import CargoRing
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.lane import Lane
from unlocked.workers.ring import Ring
from unlocked.workers.stamps import DeviceClock, EventStamps
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Streams"]

_GRAPHS_AHEAD = 3  # tick graphs that the host may issue ahead of the device
# Without tick graphs and without a trace, the actions of so many ticks out of so many are timed.
_SAMPLED_TICKS, _SAMPLE_EVERY = 32, 256


@dataclass(frozen=True, kw_only=True)
class Streams(PipelineOptions):
    """All stages in this process on one device, a stream for each; on a GPU the ticks are launched as CUDA graphs."""

    name: ClassVar[str] = "streams"

    graphs: bool = setting(True, "replay CUDA graphs", off="plain launches instead of CUDA graphs")
    graph_ticks: int = setting(
        32,
        "micro-batches of every stage in one CUDA graph, rounded up to a multiple of the queue depth (0: a graph per "
        "stage and micro-batch)",
        at_least=0,
        at_most=4096,
    )
    """Long enough to hide a launch, short enough for an orderly stop."""
    green_contexts: str = setting(
        "off",
        "per stage, on a GPU: off, sms (a share of it) or queues (work queues of its own)",
        choices=GREEN_CONTEXTS,
    )

    def check(self, settings: Settings, global_rule: str | None) -> None:
        if global_rule is not None and self.stages not in (None, 1):
            raise ValueError(
                f"{global_rule} is not local: every layer waits for the output's error, so it is one stage, got "
                f"stages={self.stages!r}; leave it out, or use engine sequential"
            )
        if self.green_contexts != "off" and not settings.device.startswith("cuda"):
            raise ValueError(
                f"green_contexts {self.green_contexts!r} need a CUDA device, the run is on {settings.device}; leave "
                "them off"
            )

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        with contextlib.ExitStack() as stack:
            if job.device.type == "cuda":
                stack.enter_context(torch.cuda.device(job.device))
                torch.cuda.reset_peak_memory_stats(job.device)
            began = time.perf_counter()
            run = _Run(job, make_sinks, self)
            stack.callback(run.close)
            run.prepare()
            if not gc.get_freeze_count():
                # Else a collection during the run walks all that was made before, for tenths of a second.
                gc.freeze()
                stack.callback(gc.unfreeze)
            setup = time.perf_counter() - began
            with StopSignals() as signals:
                seconds = run.train(signals)
            return run.finish(seconds, setup, signals.received)


class _Run:
    """One run's lanes and what they have done so far."""

    def __init__(self, job: Job, make_sinks: SinkMaker, options: Streams) -> None:
        self.job, self.device, self.plan, self.options = job, job.device, job.plan, options
        self.saver = RunSaver(job)
        self.parts = _partition(job, options.stages)
        self.streams, self._contexts = make_streams(options.green_contexts, job.device, len(self.parts))
        self.traced = job.settings.trace is not None
        self.stopwatches = [Stopwatch(keep=self.traced) for _ in self.parts]
        rings = _rings(job, self.parts, options.queue_depth)
        exits = [*rings[1:], None]
        self.lanes = [self._lane(k, part, rings[k], exits[k]) for k, part in enumerate(self.parts)]
        if job.resume is not None:
            for lane in self.lanes:
                load_layers(job.resume, lane.stage.layers)
            warn_of_threads(job, threads_of(job))
        self.fan_out = FanOut(make_sinks())
        self.outlet = LocalOutlet(self.fan_out, len(self.lanes), job.lr_factor)
        self.fan_out.on_start(job.run_info(self.parts))
        self.reporters = [
            StageReporter(
                lane.stage,
                job.plan,
                stopwatch,
                self.outlet,
                lr_factor=job.lr_factor,
                print_freq=job.settings.print_freq,
                start=job.start,
                waits_for_losses=job.lr_factor.needs_losses or self.fan_out.waits,
                best_dir=job.settings.best_dir,
                sizes=job.network.sums,
            )
            for lane, stopwatch in zip(self.lanes, self.stopwatches, strict=True)
        ]
        if job.lr_factor.per_step:
            for reporter, lane in zip(self.reporters, self.lanes, strict=True):
                set_rates_per_step(reporter, lane.stage, job.plan, job.lr_factor.at)
        self.captures = options.graphs and self._capturable()
        self.graphs: Mapping[ItemKind, TickGraph] = {}
        self.clock: DeviceClock | None = None
        self.events: EventStamps | None = None
        self._issued: deque[torch.cuda.Event] = deque()
        self._first, self._end = job.start, len(job.plan)  # of the part of the stream that is under way

    def _lane(self, k: int, part: range, entry: Ring, exit: Ring | None) -> Lane:
        return Lane(
            self.job.stage(k, part),
            entry,
            exit,
            self.streams[k],
            snapshot=lambda item: self.saver.mark(self.lanes[k].stage, item),
            before_item=lambda item: self.reporters[k].before(item),
            after_item=lambda item: self.reporters[k].after(item),
            stopwatch=self.stopwatches[k],
            find_item=self.plan.__getitem__,
        )

    def prepare(self) -> None:
        """Captures after a warm-up whose effects are undone, and waits for everything that was begun."""
        if self.captures:
            depth, ticks = self.options.queue_depth, self.options.graph_ticks
            ticks = 0 if self.job.lr_factor.per_step else ticks  # in one launch the rate is one
            self.graphs = capture(self.job, self.lanes, queue_depth=depth, graph_ticks=ticks, timed=self.traced)
        set_others_aside(self.job)
        # Streams of the pool don't wait for the default one, on which layers, data and rings were made.
        self._synchronize()

    def train(self, signals: StopSignals) -> float:
        """Issues every tick; returns the seconds until the device had done them."""
        for stopwatch in self.stopwatches:
            stopwatch.restart()
        self._begin_stamps()
        began = time.perf_counter()
        try:
            for first, end in self.job.segments(self.fan_out.waits):
                self._first, self._end = first, end
                self._run_segment(signals)
                if self._stops(signals):
                    break
            self._synchronize()
            if self._stops(signals):
                self.saver.save_stopped([lane.stage for lane in self.lanes], self._end)
            self.saver.finish()
        except BaseException:
            # Nobody may free or reuse what the device still works on. If that is what failed, the cause is on its way.
            with contextlib.suppress(RuntimeError):
                self._synchronize()
            raise
        seconds = time.perf_counter() - began
        if self.events is not None:
            self.events.cut()
        self._collect()  # all of them: the device is done
        for reporter in self.reporters:
            reporter.check_weights(self._end)
        return seconds

    def _run_segment(self, signals: StopSignals) -> None:
        """Fills the pipeline, runs it, drains it."""
        tick, lag = self._first, len(self.lanes) - 1
        while tick < self._end + lag:
            if self._stops(signals):
                # What stage 0 has begun flows through, nothing new enters.
                self._end = min(self._end, stop_position(self.job, tick))
                if tick >= self._end + lag:
                    break
            self.saver.marks.look(tick, time.monotonic())
            graph = self._launch_ticks(tick)
            if graph is None:
                self._sample(tick)
                self._issue(tick)
            tick += graph.ticks if graph else 1
            # One by one: what the first still waits for is mostly what all wait for.
            all(reporter.poll() for reporter in self.reporters)
            self.saver.check()
        for reporter in self.reporters:  # what the next segment's learning rate may depend on
            reporter.poll(wait=True)

    def _stops(self, signals: StopSignals) -> bool:
        return signals.received is not None or bool(self.fan_out.stop_reason)

    def close(self) -> None:
        self.saver.close()
        for lane in self.lanes:
            lane.stage.close()

    def finish(self, seconds: float, setup: float, stopped_by: int | None) -> RunResult:
        for reporter in self.reporters:
            self.outlet.progress(reporter.progress(self._end, self.plan[max(self._end - 1, 0)].epoch))
        if self.clock is not None:
            busy = self.clock.busy_fraction(seconds)
        else:
            busy = [stopwatch.busy / max(seconds, 1e-9) for stopwatch in self.stopwatches]
        if self.job.settings.trace is not None:
            rows = {k: f"stage {k}: {', '.join(lane.stage.layer_names)}" for k, lane in enumerate(self.lanes)}
            timed = [action for stopwatch in self.stopwatches for action in stopwatch.timed]
            write_chrome_trace(self.job.settings.trace, timed, rows)
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
            stop_reason=self.fan_out.stop_reason,
        )

    def _issue(self, tick: int) -> None:
        """One tick, stage by stage. Later stages first: they read a slot before the stage before them refills it."""
        for graph in self.graphs.values():
            graph.place.leave()
        for k, lane in reversed(list(enumerate(self.lanes))):
            position = tick - k
            if not self._first <= position < self._end:
                continue
            items = list(self.plan.items(position, position + 1, self.saver.marks.positions))
            with lane.on_stream():
                lane.run(items, stage_actions(k, len(self.lanes), items))

    def _launch_ticks(self, tick: int) -> TickGraph | None:
        """Launches the tick graph that begins here, if there is one: all of its micro-batches are full ones of one kind
        and epoch, past its first and before its last (where there are sums to begin and to report)."""
        lag = len(self.lanes) - 1
        if tick - lag <= self._first or tick >= self._end:
            return None  # every stage's first micro-batch here is issued by itself: its learning rate is set before it
        oldest = self.plan[tick - lag]  # the last stage's first
        graph = self.graphs.get(oldest.kind)
        if graph is None or tick % graph.alignment or oldest.index == 0 or tick + graph.ticks > self._end:
            return None
        newest = self.plan[tick + graph.ticks - 1]
        if newest.kind != oldest.kind or newest.last or not oldest.size == newest.size == graph.rows:
            return None
        if newest.epoch != oldest.epoch or newest.index - oldest.index != lag + graph.ticks - 1:
            return None
        if self.plan.has_mark(tick - lag, tick + graph.ticks, self.saver.marks.positions):
            return None
        self._launch(graph, oldest, lag)
        return graph

    def _launch(self, graph: TickGraph, oldest: Item, lag: int) -> None:
        if self.events is not None:
            self.events.cut()

        def items(later: int) -> list[Item]:
            return [
                Item(oldest.position + n, oldest.kind, oldest.epoch, oldest.index + n, oldest.size, False)
                for n in range(lag + later, later - 1, -1)
            ]

        firsts = items(0)
        graph.launch(firsts[0])
        due = [reporter.skip(first, graph.ticks) for reporter, first in zip(self.reporters, firsts, strict=True)]
        if due[-1]:  # the last stage's sums are reported; the others' are looked at on the way
            with graph.place.on_stream():
                read_together(self.reporters, items(graph.ticks - 1))
        self._collect()
        if graph.stream is not None:
            event = torch.cuda.Event()
            event.record(graph.stream)
            self._issued.append(event)
            if len(self._issued) > _GRAPHS_AHEAD:
                self._issued.popleft().synchronize()

    def _begin_stamps(self) -> None:
        """On a CPU the loop times every action. On a GPU all are stamped for a trace; else samples of the tick graphs,
        or of the ticks."""
        if self.device.type == "cpu":
            return
        self.clock = DeviceClock(self.stopwatches, whole=self.traced)
        for graph in self.graphs.values():
            graph.clock = self.clock
        if self.traced or "train" not in self.graphs:
            self.events = EventStamps([stream for stream in self.streams if stream is not None], self.clock)
        if self.traced:
            for lane in self.lanes:
                lane.stamp = self.events

    def _sample(self, tick: int) -> None:
        """Without tick graphs and without a trace: begins and ends the windows of ticks that are timed."""
        if self.events is None or self.traced:
            return
        since_start = tick - self.job.start
        timed = since_start % _SAMPLE_EVERY < _SAMPLED_TICKS
        if since_start % _SAMPLED_TICKS == 0:
            self.events.cut()
            self._collect()
        for lane in self.lanes:
            lane.stamp = self.events if timed else None

    def _collect(self) -> None:
        """Takes in the times that have come from the device."""
        if self.clock is not None:
            for graph in self.graphs.values():
                graph.collect()
        if self.events is not None:
            self.events.collect()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capturable(self) -> bool:
        drawing = [layer.name for lane in self.lanes for layer in lane.stage.layers if isinstance(layer, DrawingLayer)]
        if drawing:
            if self.device.type != "cpu":
                warnings.warn(
                    f"streams: no CUDA graphs, because layer {', '.join(drawing)} draws from a global generator, which "
                    "only the host can seed (nn.Dropout is keyed on the device), or has a rule that takes whole passes",
                    stacklevel=2,
                )
            return False
        if self.device.type == "cpu" or all(lane.is_capturable for lane in self.lanes):
            return True
        warnings.warn(
            "streams: no CUDA graphs, because an optimizer keeps state on the host; install triton for fused ones",
            stacklevel=2,
        )
        return False


def _partition(job: Job, stages: int | str | None) -> list[range]:
    layers = len(job.network.blocks)
    costs = [1.0] * layers
    if isinstance(stages, int) and 1 < stages < layers:
        costs = job.costs()
    return job.partition(costs, layers if stages in (None, AUTO) else stages)


def _rings(job: Job, parts: list[range], queue_depth: int) -> list[Ring]:
    """The ring that each stage reads."""
    plan, network, device = job.plan, job.network, job.device
    rings = []
    for k, part in enumerate(parts):
        shape = network.output_shapes[part.start - 1] if k else network.input_shape
        # Only these are known to flatten first: another flat layer may begin with a convolution.
        flat = isinstance(network.blocks[part.start], LinearBlock | OutputBlock)
        depth = queue_depth if k else 1
        dtype = job.storage if k or network.input_dtype.is_floating_point else network.input_dtype
        traffic = network.side_channel.traffic(part.start - 1) if k else network.side_channel.entering
        kind: Any = partial(CargoRing, traffic=traffic) if traffic else Ring
        form = {"dtype": dtype, "target": network.target}
        rings.append(kind(depth, plan.max_rows, shape, device, flat_consumer=flat and k > 0, **form))
    return rings
