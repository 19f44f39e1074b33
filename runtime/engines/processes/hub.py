"""Rank 0's extra duties: partition, coordinator, the whole run's result."""

import threading
from collections.abc import Sequence
from typing import Any

import torch

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.control.windows import EpochGate
from unlocked.runtime.engines.one_process import steps_before
from unlocked.runtime.engines.processes.options import ProcessesOptions, heartbeat_timeout, settings_of
from unlocked.runtime.engines.processes.rendezvous import World
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult, unpack_tensors, weights_digest
from unlocked.runtime.saving.snapshots import write_manifest
from unlocked.workers.stopwatch import TimedAction

__all__ = ["Hub"]

_SINKS_SECONDS = 3.0  # that sinks may take to close when the run is aborted


class Hub:
    """Rank 0's extra duties: partition, coordinator, the whole run's result."""

    def __init__(
        self, job: Job, options: ProcessesOptions, world: World, make_sinks: SinkMaker, num_stages: int
    ) -> None:
        self._job, self._options, self._world, self._num_stages = job, options, world, num_stages
        self._make_sinks = make_sinks
        self._own_sinks: Sequence[MetricsSink] = ()
        self._coordinator: Coordinator | None = None
        self._lost: str | None = None

    def publish(self, device: torch.device) -> dict[str, Any]:
        """Decides who owns what and opens the coordinator; what every rank must know."""
        job, options = self._job, self._options
        costs = job.costs(device) if self._num_stages > 1 else [1.0] * len(job.network.blocks)
        stages = options.stages if isinstance(options.stages, str) else self._num_stages
        parts = job.partition(costs, stages)
        self._own_sinks = self._make_sinks()
        self._sinks = FanOut(self._own_sinks)
        local = self._world.is_local
        coordinator = Coordinator(
            [[job.network.names[i] for i in part] for part in parts],
            len(job.plan),
            first=job.start,
            queue_depth=options.queue_depth,
            host="127.0.0.1" if local else "0.0.0.0",
            advertise=None if local else self._world.master_address,
            port=options.coordinator_port,
            gate=_gate(job),
            sink=self._sinks,
            on_snapshot=self._complete_snapshot,
            start_timeout=options.start_timeout,
            heartbeat_timeout=heartbeat_timeout(job),
        )
        self._sinks.on_start(job.run_info(parts))  # after every mistake that can be found before: it writes files
        coordinator.start()
        self._coordinator = coordinator
        if self._lost is not None:
            raise RunFailed(self._lost)
        return {
            "parts": [(part.start, part.stop) for part in parts],
            "address": coordinator.address,
            "costs": [sum(costs[i] for i in part) for part in parts],
            "settings": settings_of(job, options),
        }

    def lose(self, rank: int) -> None:
        """A process has ended during its set-up. From any thread."""
        self._lost = f"{stage_name(rank)} is lost: its process ended during set-up"
        if self._coordinator is not None:  # else `publish` looks when it has one
            self._coordinator.abort(self._lost)

    def close_sinks(self, message: str) -> None:
        """Tells the sinks of the failure before the process ends: a live dashboard hides the cursor, for one.

        One that hangs keeps the process no longer than a few seconds.
        """
        sinks = FanOut(self._own_sinks)
        ending = threading.Thread(target=sinks.__exit__, args=(RunFailed, RunFailed(message), None), daemon=True)
        ending.start()
        ending.join(_SINKS_SECONDS)

    def collect(self, parts: list[range], predicted: list[float], client: CoordinatorClient) -> RunResult:
        assert self._coordinator is not None
        payloads = self._coordinator.results()
        self._coordinator.close()
        stages = [payloads[i] for i in range(len(parts))]
        weights = {k: v for payload in stages for k, v in unpack_tensors(payload["weights"]).items()}
        seconds = max(payload["train_seconds"] for payload in stages)
        job = self._job
        names = [[job.network.names[i] for i in part] for part in parts]
        if job.settings.trace is not None:
            spans = [TimedAction(i, *span) for i, payload in enumerate(stages) for span in payload["spans"]]
            rows = {i: f"stage {i}: {', '.join(layers)}" for i, layers in enumerate(names)}
            write_chrome_trace(job.settings.trace, spans, rows)
        return RunResult(
            engine=job.engine,
            stages=names,
            epochs=self._coordinator.epochs,
            steps=steps_before(job.plan, stages[0]["position"]),
            train_seconds=seconds,
            setup_seconds=stages[0]["setup_seconds"],
            images_per_second=stages[0]["images"] / max(seconds, 1e-9),
            weights=weights,
            weights_sha256=weights_digest(weights.items()),
            peak_memory_bytes=[payload["peak_memory"] for payload in stages],
            busy_fraction=[payload["busy"] for payload in stages],
            stopped_by=client.stopped.signal if client.stopped else None,
            predicted_stage_seconds=predicted if len(parts) > 1 else [],
            measured_stage_seconds=[payload["step_seconds"] for payload in stages],
        )

    def _complete_snapshot(self, position: int) -> None:
        job = self._job
        assert job.settings.snapshot_dir is not None
        steps = steps_before(job.plan, position)
        losses = job.lr_factor.losses_before(job.plan[position].epoch)
        write_manifest(
            job.settings.snapshot_dir,
            position=position + 1,
            steps=steps,
            settings=job.fingerprint,
            test_losses=losses,
        )


def _gate(job: Job) -> EpochGate | None:
    if not job.lr_factor.needs_losses:
        return None
    plan = job.plan
    return EpochGate(job.lr_factor, plan.end_of_epoch, plan.num_epochs, plan[job.start].epoch)
