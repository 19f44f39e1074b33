"""Rank 0's extra duties: partition, coordinator, the whole run's result."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.interfaces import listening_host
from unlocked.runtime.control.messages import Files, RunFailed, Stop
from unlocked.runtime.control.windows import EpochGate
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.one_process import (
    epochs_before,
    stop_position,
    warn_of_threads,
)
from unlocked.runtime.engines.processes.admission import Admission
from unlocked.runtime.engines.processes.options import ProcessesOptions, heartbeat_timeout, settings_of
from unlocked.runtime.engines.processes.placing import Placer
from unlocked.runtime.engines.processes.rendezvous import meeting_folder, store_door
from unlocked.runtime.engines.saver import complete_snapshot, timed_marks
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult
from unlocked.runtime.schedules.placement import Placement
from unlocked.runtime.tensors import weights_digest
from unlocked.workers.stopwatch import TimedAction

__all__ = ["Hub"]


class Hub:
    """Rank 0's extra duties: partition, coordinator, the whole run's result."""

    def __init__(
        self,
        job: Job,
        options: ProcessesOptions,
        world: World,
        make_sinks: SinkMaker,
    ) -> None:
        self._job, self._options, self._world = job, options, world
        self._make_sinks = make_sinks
        self._own_sinks: Sequence[MetricsSink] = ()
        self._coordinator: Coordinator | None = None
        self._placement: Placement | None = None
        self._threads: list[int] = []  # of every stage's process
        self._layer_threads: dict[str, int] = {}
        self._marks = timed_marks(job)

    def publish(self, device: torch.device, placer: Placer, store: dist.Store, measured: bool) -> dict[str, Any]:
        """Decides who owns what and opens the coordinator; what every rank must know.

        Args:
            measured: links are measured, see `Placer.place`.
        """
        job, options = self._job, self._options
        if self._world.is_local:
            placer.read()
        self._placement = placement = placer.place(device, store, measured)
        parts = [range(len(job.network.blocks))] if placement is None else list(placement.stages)
        self._own_sinks = self._make_sinks()
        self._sinks = FanOut(self._own_sinks)
        coordinator = Coordinator(
            [[job.network.names[i] for i in part] for part in parts],
            len(job.plan),
            first=job.start,
            queue_depth=options.queue_depth,
            host=self._host(),
            advertise=None if self._world.is_local else self._world.master_address,
            admits=Admission(self._world, options.start_timeout),
            port=options.coordinator_port,
            gate=_gate(job, self._sinks.waits),
            sink=self._sinks,
            marks=self._marks,
            on_snapshot=self._complete,
            stop_at=partial(stop_position, job),
            start_timeout=options.start_timeout,
            heartbeat_timeout=heartbeat_timeout(job),
        )
        self._sinks.on_start(job.run_info(parts))  # after every mistake that can be found before: it writes files
        coordinator.start()
        self._coordinator = coordinator
        self._sinks.on_stop = lambda reason: coordinator.request_stop(reason=reason)
        if self._sinks.stop_reason:  # in `on_start` already
            coordinator.request_stop(reason=self._sinks.stop_reason)
        return {
            "waits": self._sinks.waits,
            "parts": [(part.start, part.stop) for part in parts],
            "address": coordinator.address,
            "settings": settings_of(job, options),
            "run": job.run,
        }

    def _host(self) -> str:
        """Where the coordinator listens."""
        folder = meeting_folder()
        if folder is not None:
            return f"ipc://{folder / 'coordinator'}"
        return listening_host(self._world) or "0.0.0.0"

    def _complete(self, position: int, files: Files) -> None:
        complete_snapshot(self._job, position, self._layer_threads, files)
        self._marks.complete(position)

    def learn_threads(self, parts: Sequence[range], threads: Sequence[int]) -> None:
        """Takes the number of threads of every stage's process, and warns of others than before a resume."""
        self._threads = list(threads)
        self._layer_threads = {
            self._job.network.names[i]: n for part, n in zip(parts, threads, strict=True) for i in part
        }
        warn_of_threads(self._job, self._layer_threads)
        if self._job.device.type == "cpu" and len(set(threads)) > 1:
            counts = ", ".join(f"{n} in stage {stage}" for stage, n in enumerate(threads))
            self._sinks.on_message(f"stages have other numbers of threads ({counts}): equal bits need equal ones")

    def expect_supervisors(self, max_recoveries: int) -> None:
        """Workers are processes of their own, and may be replaced so often within an hour. Before any rank's crew."""
        assert self._coordinator is not None
        self._coordinator.expect_supervisors(max_recoveries, store_door())

    def close_sinks(self, message: str) -> None:
        """Tells the sinks of the failure before the process ends: a live dashboard hides the cursor, for one."""
        FanOut(self._own_sinks).__exit__(RunFailed, RunFailed(message), None)

    def collect(
        self,
        parts: list[range],
        weights: Mapping[str, torch.Tensor],
        *,
        setup_seconds: float,
        stopped: Stop | None,
    ) -> RunResult:
        """The whole run's result, once all stages have finished."""
        assert self._coordinator is not None
        payloads = self._coordinator.results()
        self._coordinator.close()
        stages = [payloads[i] for i in range(len(parts))]
        placement = self._placement
        seconds = max(payload["train_seconds"] for payload in stages)
        job = self._job
        names = [[job.network.names[i] for i in part] for part in parts]
        if job.settings.trace is not None:
            spans = [TimedAction(i, *span) for i, payload in enumerate(stages) for span in payload["spans"]]
            spans += [
                TimedAction(r.stage, f"recovery {r.incarnation}", 1e6 * (r.ended - r.seconds), 1e6 * r.ended)
                for r in self._coordinator.recoveries
            ]
            rows = {i: f"stage {i}: {', '.join(layers)}" for i, layers in enumerate(names)}
            write_chrome_trace(job.settings.trace, spans, rows)
        return RunResult(
            engine=job.engine,
            stages=names,
            epochs=self._coordinator.epochs,
            epochs_done=epochs_before(job.plan, stages[0]["position"]),
            steps=job.plan.steps_before(stages[0]["position"]),
            first_step=job.plan.steps_before(job.start),
            train_seconds=seconds,
            setup_seconds=setup_seconds,
            images_per_second=stages[0]["images"] / max(seconds, 1e-9),
            predicted_images_per_second=self._predicted_rate(),
            links=[] if placement is None else list(placement.links),
            weights=dict(weights),
            weights_sha256=weights_digest(weights.items()),
            peak_memory_bytes=[payload["peak_memory"] for payload in stages],
            busy_fraction=[payload["busy"] for payload in stages],
            threads=self._threads,
            stopped_by=stopped.signal if stopped else None,
            stop_reason=self._sinks.stop_reason,
            predicted_stage_seconds=[] if placement is None else placement.stage_seconds,
            measured_stage_seconds=[payload["step_seconds"] for payload in stages],
            recoveries=self._coordinator.recoveries,
        )

    def _predicted_rate(self) -> float:
        job = self._job
        if self._placement is None:
            return 0.0
        return self._placement.images_per_second(job.plan, job.start, self._options.queue_depth)


def _gate(job: Job, for_sinks: bool) -> EpochGate | None:
    if not (for_sinks or job.lr_factor.needs_losses):
        return None
    plan = job.plan
    epoch = plan[job.start].epoch
    return EpochGate(job.lr_factor, plan.end_of_epoch, plan.num_epochs, epoch, for_sinks=for_sinks)
