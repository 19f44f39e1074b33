"""The plain loop: one stage with all layers, in this process. The reference for every other engine."""

import time

from unlocked.runtime.engines.one_process import LocalOutlet, finish_result, write_stage_snapshot
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.signals import StopSignals
from unlocked.workers.actions import Item
from unlocked.workers.errors import StopRun
from unlocked.workers.loop import StageLoop
from unlocked.workers.stopwatch import Recorder

__all__ = ["SequentialEngine"]

_WINDOW = 256  # items whose actions are listed at a time


class SequentialEngine:
    """All layers in one stage: every layer updates before the next one runs."""

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        if job.settings.stages not in (None, 1):
            raise ValueError(f"the sequential engine has one stage, got stages={job.settings.stages!r}; leave it out")
        if job.device.type == "cuda":
            from unlocked.runtime.engines.streams.engine import StreamsEngine

            return StreamsEngine(max_stages=1).run(job, make_sinks)
        began = time.perf_counter()
        part = range(len(job.network.blocks))
        stage = job.stage(0, part)
        if job.settings.resume is not None:
            load_layers(job.settings.resume, stage.layers)
        recorder = Recorder(keep=job.settings.trace is not None)
        fan_out = FanOut(make_sinks())
        outlet = LocalOutlet(fan_out, 1, job.lr_factor)
        fan_out.on_start(job.run_info([part]))
        reporter = StageReporter(
            stage,
            job.plan,
            recorder,
            outlet,
            lr_factor=job.lr_factor,
            print_freq=job.settings.print_freq,
            start=job.start,
            waits_for_losses=job.lr_factor.needs_losses,
            best_dir=job.settings.best_dir,
        )
        position = job.start
        with StopSignals() as signals:

            def after(item: Item) -> None:
                nonlocal position
                reporter.after(item)
                position = item.position + 1
                if signals.received is not None:
                    raise StopRun

            loop = StageLoop(
                stage,
                rank=0,
                inbox=None,
                outbox=None,
                snapshot=lambda item: write_stage_snapshot(job, stage, item, last=True),
                before_item=reporter.before,
                after_item=after,
                recorder=recorder,
            )
            recorder.restart()
            setup = time.perf_counter() - began
            train_began = time.perf_counter()
            try:
                for start in range(job.start, len(job.plan), _WINDOW):
                    items = list(job.plan.items(start, min(start + _WINDOW, len(job.plan))))
                    loop.run(items, stage_actions(0, 1, items))
            except StopRun:
                pass
            finally:
                stage.close()
        seconds = time.perf_counter() - train_began
        outlet.progress(reporter.progress(position, job.plan[max(position - 1, 0)].epoch))
        if job.settings.trace is not None:
            write_chrome_trace(job.settings.trace, recorder.spans, {0: "stage 0: " + ", ".join(stage.layer_names)})
        return finish_result(
            job,
            [stage],
            outlet,
            position=position,
            images=reporter.images,
            train_seconds=seconds,
            setup_seconds=setup,
            busy_fraction=[recorder.busy / max(seconds, 1e-9)],
            stopped_by=signals.received,
            step_seconds=[recorder.seconds_per_step()],
        )
