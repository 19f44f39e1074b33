"""Where a run's time goes: a trainer whose stages time their data and their optimizers.

The clocks stand around what a stage calls anyway, so the training itself is untouched: four readings of the clock per
layer and micro-batch, well below a thousandth of a step.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch

from unlocked.comparison.energy import energy_joules
from unlocked.runtime import Trainer
from unlocked.runtime.job import Job
from unlocked.runtime.machine import peak_memory_bytes
from unlocked.workers.stage import Stage

__all__ = ["MeasuredTrainer", "Meter", "reset_peak_memory"]


class Meter:
    """Adds up the seconds of data and updates of one process, and notes the energy at the start of training.

    Args:
        device: of the training. On a GPU the host's clock says nothing, so only the energy is noted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data_seconds = self.update_seconds = 0.0
        self._depth = 0
        self._energy: float | None = None
        self._began = False

    def begin(self) -> None:
        """Training begins now (only the first call counts)."""
        if not self._began:
            self._began = True
            self._energy = energy_joules(self.device)

    def energy_joules(self) -> float | None:
        """Since `begin`; None where nothing tells it, or a counter began anew in between."""
        now = energy_joules(self.device)
        if now is None or self._energy is None or now < self._energy:
            return None
        return now - self._energy

    def timed(self, counter: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its seconds count for `counter`, unless it was called by another timed one."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                setattr(self, counter, getattr(self, counter) + time.perf_counter() - start)

        return call

    def watch(self, stage: Stage) -> Stage:
        """Times the stage's data and updates."""
        stage.begin_epoch = self._noting_begin(stage.begin_epoch)  # type: ignore[method-assign]
        if self.device.type != "cpu":
            return stage
        for name in ("load", "load_at_cursor"):
            if hasattr(stage.source, name):
                setattr(stage.source, name, self.timed("data_seconds", getattr(stage.source, name)))
        for layer in stage.layers:
            if layer.optimizer is not None:
                layer.optimizer.step = self.timed("update_seconds", layer.optimizer.step)
        return stage

    def _noting_begin(self, function: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            self.begin()
            function()

        return call


@dataclass(frozen=True, kw_only=True)
class _MeasuredJob(Job):
    meter: Meter

    def stage(
        self,
        index: int,
        layers: range,
        device: torch.device | None = None,
        *,
        prefetch: int | None = None,
        start: int | None = None,
    ) -> Stage:
        return self.meter.watch(Job.stage(self, index, layers, device, prefetch=prefetch, start=start))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MeasuredTrainer(Trainer):
    """A `Trainer` whose stages are watched by the meter of this process."""

    meter: Meter

    def _job(self, *args: Any, **kwargs: Any) -> Job:
        job = super()._job(*args, **kwargs)
        return _MeasuredJob(meter=self.meter, **{field.name: getattr(job, field.name) for field in fields(Job)})


def reset_peak_memory(device: torch.device) -> int:
    """What was held so far (libraries, loading data) no longer counts as the process's peak, where the system can
    forget it. What is held now, in bytes as `peak_memory_bytes` counts them."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        with open("/proc/self/clear_refs", "w") as file:  # Linux: 5 resets the high-water mark of the resident set
            file.write("5")
    except OSError:
        pass
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE
    except OSError:
        return peak_memory_bytes(device)
