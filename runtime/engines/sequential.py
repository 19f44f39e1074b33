"""The plain loop: one stage with all layers, in this process. The reference for every other engine."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from unlocked.runtime.engines.one_process import (
    LocalOutlet,
    finish_result,
    stop_position,
    threads_of,
    warn_of_threads,
)
from unlocked.runtime.engines.saver import RunSaver, set_others_aside
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.metrics.step_rates import set_rates_per_step
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.marks import TimedMarks
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.settings import Settings
from unlocked.runtime.signals import StopSignals
from unlocked.workers.actions import Item
from unlocked.workers.errors import StopRun
from unlocked.workers.loop import StageLoop
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Sequential"]

_WINDOW = 256  # items whose actions are listed at a time, at most
_LOOK_SECONDS = 0.1  # between two looks at the clock, where a run saves itself by it


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """All layers in one stage of this process: every layer updates before the next one runs. Has no options."""

    name: ClassVar[str] = "sequential"

    def check(self, settings: Settings, global_rule: str | None) -> None:
        """Everything runs here."""

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        with contextlib.ExitStack() as stack:
            if job.device.type == "cuda":
                stack.enter_context(torch.cuda.device(job.device))
                torch.cuda.reset_peak_memory_stats(job.device)
            return _run(job, make_sinks)


def _windows(job: Job, marks: TimedMarks) -> Iterator[list[Item]]:
    """The stream in pieces. Where a run saves itself by the clock, they are as short as it takes to look at it."""
    by_clock = job.settings.snapshot_period.seconds > 0
    start, size = job.start, 1 if by_clock else _WINDOW
    while start < len(job.plan):
        stop, looked = min(start + size, len(job.plan)), time.monotonic()
        yield list(job.plan.items(start, stop, marks.look(start, looked)))
        start = stop
        if by_clock:
            size = min(max(1, int(size * _LOOK_SECONDS / max(time.monotonic() - looked, 1e-6))), _WINDOW)


def _run(job: Job, make_sinks: SinkMaker) -> RunResult:
    began = time.perf_counter()
    part = range(len(job.network.blocks))
    stage = job.stage(0, part)
    if job.resume is not None:
        load_layers(job.resume, stage.layers)
        warn_of_threads(job, threads_of(job))
    stopwatch = Stopwatch(keep=job.settings.trace is not None)
    fan_out = FanOut(make_sinks())
    outlet = LocalOutlet(fan_out, 1, job.lr_factor)
    fan_out.on_start(job.run_info([part]))
    reporter = StageReporter(
        stage,
        job.plan,
        stopwatch,
        outlet,
        lr_factor=job.lr_factor,
        print_freq=job.settings.print_freq,
        start=job.start,
        waits_for_losses=job.lr_factor.needs_losses or fan_out.waits,
        best_dir=job.settings.best_dir,
        sizes=job.network.sums,
    )
    if job.lr_factor.per_step:
        set_rates_per_step(reporter, stage, job.plan, job.lr_factor.at)
    set_others_aside(job)
    position = job.start
    with StopSignals() as signals, contextlib.closing(RunSaver(job)) as saver:

        def after(item: Item) -> None:
            nonlocal position
            reporter.after(item)
            saver.check()
            position = item.position + 1
            stops = signals.received is not None or fan_out.stop_reason
            if stops and stop_position(job, position) == position:
                raise StopRun

        loop = StageLoop(
            stage,
            rank=0,
            inbox=None,
            outbox=None,
            snapshot=partial(saver.mark, stage),
            before_item=reporter.before,
            after_item=after,
            stopwatch=stopwatch,
        )
        stopwatch.restart()
        setup = time.perf_counter() - began
        train_began = time.perf_counter()
        try:
            for items in _windows(job, saver.marks):
                loop.run(items, stage_actions(0, 1, items))
        except StopRun:
            saver.save_stopped([stage], position)
        finally:
            stage.close()
        saver.finish()
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    reporter.poll(wait=True)
    seconds = time.perf_counter() - train_began
    reporter.check_weights(position)
    outlet.progress(reporter.progress(position, job.plan[max(position - 1, 0)].epoch))
    if job.settings.trace is not None:
        write_chrome_trace(job.settings.trace, stopwatch.timed, {0: "stage 0: " + ", ".join(stage.layer_names)})
    return finish_result(
        job,
        [stage],
        outlet,
        position=position,
        images=reporter.images,
        train_seconds=seconds,
        setup_seconds=setup,
        busy_fraction=[stopwatch.busy / max(seconds, 1e-9)],
        stopped_by=signals.received,
        stop_reason=fan_out.stop_reason,
        step_seconds=[stopwatch.seconds_per_step()],
    )
