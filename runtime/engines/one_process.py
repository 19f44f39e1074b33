"""What the engines that run in one process share: their outlet, snapshots and results."""

import warnings
from collections.abc import Mapping, Sequence

import torch

from unlocked.runtime.job import Job
from unlocked.runtime.learning_rate import LearningRate
from unlocked.runtime.machine import peak_memory_bytes
from unlocked.runtime.metrics.records import EpochAggregator, EpochPart, EpochResult, StageProgress, StepResult
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.result import RunResult
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.tensors import weights_digest
from unlocked.workers.stage import Stage

__all__ = [
    "LocalOutlet",
    "epochs_before",
    "finish_result",
    "saves_stop",
    "stop_position",
    "threads_of",
    "warn_of_threads",
]


class LocalOutlet:
    """Hands records to the sinks at once, keeps the epochs' results, and tells the learning rate the test losses."""

    def __init__(self, sinks: FanOut, num_stages: int, lr_factor: LearningRate) -> None:
        self.epochs: list[EpochResult] = []
        self._sinks, self._aggregator = sinks, EpochAggregator(num_stages)
        self._lr_factor = lr_factor
        self.unconfirmed: tuple[EpochPart, ...] = ()  # nothing can be lost

    def progress(self, progress: StageProgress) -> None:
        self._sinks.on_progress(progress)

    def step(self, step: StepResult) -> None:
        self._sinks.on_step(step)

    def epoch(self, part: EpochPart) -> None:
        for result in self._aggregator.add(part):
            self.epochs.append(result)
            self._sinks.on_epoch(result)
            if result.eval_loss is not None:
                text = self._lr_factor.observe(result.epoch, result.eval_loss)
                if text is not None:
                    self._sinks.on_message(text)


def epochs_before(plan: StreamPlan, position: int) -> int:
    """Epochs that end before `position`, over the whole run."""
    return plan[position].epoch if position < len(plan) else plan.num_epochs


def warn_of_threads(job: Job, threads: Mapping[str, int]) -> None:
    """One warning where layers of a resumed run have other numbers of threads than before. A GPU's bits don't depend
    on them.

    Args:
        threads: each layer's now.
    """
    on_cpu = job.device.type == "cpu"
    text = job.resume.other_threads(threads) if job.resume is not None and on_cpu else None
    if text is not None:
        warnings.warn(text, stacklevel=2)


def threads_of(job: Job) -> dict[str, int]:
    """Each layer's number of threads, where all run in this process."""
    return dict.fromkeys(job.network.names, torch.get_num_threads())


def stop_position(job: Job, position: int) -> int:
    """Where an orderly stop that comes at `position` takes effect: where the run can be resumed, if it is saved."""
    return position if job.settings.snapshot_dir is None else job.plan.resumable(position)


def saves_stop(job: Job, position: int) -> bool:
    """Whether an orderly stop before `position` leaves a snapshot: there is a folder, something done and something
    left to do."""
    return job.settings.snapshot_dir is not None and job.start < position < len(job.plan)


def finish_result(
    job: Job,
    stages: Sequence[Stage],
    outlet: LocalOutlet,
    *,
    position: int,
    images: int,
    train_seconds: float,
    setup_seconds: float,
    busy_fraction: list[float],
    stopped_by: int | None,
    stop_reason: str = "",
    step_seconds: Sequence[float] = (),
) -> RunResult:
    """Collects weights and figures of stages in this process."""
    for stage in stages:
        for layer in stage.layers:
            layer.set_mode("evaluate")  # a schedule-free optimizer leaves its evaluation weights behind
    weights = {
        name: value.detach().cpu().clone()
        for stage in stages
        for layer in stage.layers
        for name, value in layer.tensors()
    }
    return RunResult(
        engine=job.engine,
        stages=[stage.layer_names for stage in stages],
        epochs=outlet.epochs,
        epochs_done=epochs_before(job.plan, position),
        steps=job.plan.steps_before(position),
        first_step=job.plan.steps_before(job.start),
        train_seconds=train_seconds,
        setup_seconds=setup_seconds,
        images_per_second=images / max(train_seconds, 1e-9),
        weights=weights,
        weights_sha256=weights_digest(weights.items()),
        peak_memory_bytes=[peak_memory_bytes(job.device)] * len(stages),
        busy_fraction=busy_fraction,
        threads=[torch.get_num_threads()] * len(stages),
        stopped_by=stopped_by,
        stop_reason=stop_reason,
        measured_stage_seconds=list(step_seconds),
    )
