"""What a stage tells about itself while it works, and what it does at the seams of epochs."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from unlocked.runtime.metrics.best import save_candidate
from unlocked.runtime.metrics.records import EpochPart, Meters, Scores, StageProgress, StepResult
from unlocked.runtime.metrics.transfer import Transfer
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item
from unlocked.workers.errors import NonFiniteLossError, NonFiniteWeightsError, StageError
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Outlet", "StageReporter", "read_together"]

_PROGRESS_SECONDS = 0.25


class Outlet(Protocol):
    """Where a stage's records go: straight to the sinks, or over the wire to the coordinator."""

    @property
    def unconfirmed(self) -> Sequence[EpochPart]:
        """What was said of epochs and may have been lost on its way."""
        ...

    def progress(self, progress: StageProgress) -> None: ...

    def step(self, step: StepResult) -> None: ...

    def epoch(self, part: EpochPart) -> None: ...


class _Reading(NamedTuple):
    """A stage's part of a transfer, and what it belongs to."""

    transfer: Transfer
    first_row: int
    item: Item
    ends_epoch: bool
    images: int
    images_evaluated: int
    steps: int
    time: float
    waiting: float


class _Base(NamedTuple):
    """Where the meters last stood."""

    time: float
    waiting: float
    images: int
    steps: int
    sums: tuple[float, ...]


class StageReporter:
    """Called before and after every item of the stream.

    Sums are read every `print_freq` training steps and at the end of an epoch. On a GPU a reading is a copy on the
    stage's stream that is looked at once it has come (`poll`): the host never waits for it in between. Where one graph
    takes many stages on, one copy reads them all (`read_together`).

    Args:
        stage: the layers.
        lr_factor: epoch -> what the learning rate is multiplied by.
        outlet: where records go.
        start: the first stream position of this run.
        waits_for_losses: the next epoch's learning rate depends on this one's test loss, so the host waits for it.
        best_dir: where the layers go as they were evaluated, if the best weights are to be kept.
        queue_fill: how full the incoming edge is, 0 to 1.
        sizes: how long each sum of the task's `measure` is.
    """

    def __init__(
        self,
        stage: Stage,
        plan: StreamPlan,
        stopwatch: Stopwatch,
        outlet: Outlet,
        *,
        lr_factor: Callable[[int], float],
        print_freq: int,
        start: int = 0,
        rank: int = 0,
        waits_for_losses: bool = False,
        best_dir: Path | None = None,
        queue_fill: Callable[[], float] = lambda: 0.0,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._stage, self._plan, self._stopwatch, self._outlet = stage, plan, stopwatch, outlet
        self._lr_factor, self._print_freq, self._rank = lr_factor, print_freq, rank
        self._waits_for_losses = waits_for_losses
        self._best_dir, self._queue_fill = best_dir, queue_fill
        self.device = stage.layers[0].device
        self._task, self._sizes = stage.layers[-1].task, sizes
        zeros = (0.0,) * len(stage.layers[-1].totals)
        self.images = 0
        """Training images that went through this stage."""
        self._epoch_lr: int | None = None
        self._run_began = self._progress_at = time.perf_counter()
        self._losses: tuple[tuple[str, float], ...] = ()
        self._steps = 0  # of this epoch, in this run
        self._epoch_base = self._recent = _Base(self._run_began, 0.0, 0, 0, zeros)
        self._readings: deque[_Reading] = deque()
        self.done_before = start
        """Items before this position have been reported: by a worker that has died, whose work this one does again."""
        if start:
            stage.resume_epoch(images_trained(plan, start))

    def before(self, item: Item) -> None:
        if item.kind == "train":
            if item.index == 0:
                self._stage.begin_epoch()
            if item.epoch != self._epoch_lr:
                self._begin(item)

    def after(self, item: Item) -> None:
        self._stage.count(item)
        if item.kind == "train":
            self.images += item.size
            self._steps += 1
        ends = self._ends_epoch(item)
        if ends and item.kind == "evaluate" and self._best_dir is not None and item.position >= self.done_before:
            save_candidate(self._best_dir, item.epoch, self._stage.layers)
        if ends or (item.kind == "train" and ((item.index + 1) % self._print_freq == 0 or item.last)):
            self.read(item, ends)
        if ends and self._waits_for_losses:
            self.poll(wait=True)
        now = time.perf_counter()
        if now - self._progress_at >= _PROGRESS_SECONDS and item.position >= self.done_before:
            self._progress_at = now
            self._outlet.progress(self.progress(item.position + 1, item.epoch))

    def skip(self, first: Item, count: int) -> bool:
        """Like `after` for `count` items that one launched graph has done together: `first` and those that follow it,
        all of its kind, size and epoch, and none of them the epoch's last.

        Returns:
            Whether the sums are to be read now (`read_together`).
        """
        self._stage.count(first, count)
        due = False
        if first.kind == "train":
            self.images += count * first.size
            self._steps += count
            due = (first.index + count) // self._print_freq > first.index // self._print_freq
        now = time.perf_counter()
        if now - self._progress_at >= _PROGRESS_SECONDS:
            self._progress_at = now
            self._outlet.progress(self.progress(first.position + count, first.epoch))
        return due

    def sums(self) -> list[Tensor]:
        return self._stage.sums()

    def read(self, item: Item, ends_epoch: bool = False) -> None:
        """Begins to read the sums as they are after `item`, on the current stream."""
        self.expect(Transfer(self.sums(), self.device), 0, item, ends_epoch)
        self.poll()

    def expect(self, transfer: Transfer, first_row: int, item: Item, ends_epoch: bool = False) -> None:
        """The rows of the transfer from `first_row` on are this stage's sums as they are after `item`."""
        stage = self._stage
        self._readings.append(
            _Reading(
                transfer,
                first_row,
                item,
                ends_epoch,
                stage.images_this_epoch,
                stage.images_evaluated,
                self._steps,
                time.perf_counter(),
                self._stopwatch.waiting,
            )
        )

    def poll(self, wait: bool = False) -> bool:
        """Looks at the readings that have come; with `wait`, at all. Returns whether none is left.

        Raises:
            StageError: a loss is not finite; names layer, epoch and micro-batch.
        """
        while self._readings:
            if not self._readings[0].transfer.has_come(wait):
                return False
            self._resolve(self._readings.popleft())
        return True

    def check_weights(self, position: int) -> None:
        """The last look, after all items before `position`: the last update's harm shows in no loss any more.

        Raises:
            StageError: a weight, or a buffer such as a running mean, is not finite; names layer and epoch.
        """
        epoch = self._plan[max(position - 1, 0)].epoch
        for layer in self._stage.layers:
            try:
                layer.finite.check()
            except NonFiniteWeightsError as error:
                raise self._failure(f"its last step (epoch {epoch})", error) from error

    def progress(self, position: int, epoch: int) -> StageProgress:
        return StageProgress(
            stage=self._stage.index,
            position=position,
            epoch=epoch,
            images=self.images,
            busy_seconds=self._stopwatch.busy,
            wait_seconds=self._stopwatch.waiting,
            seconds=time.perf_counter() - self._run_began,
            queue_fill=self._queue_fill(),
            local_losses=self._losses,
        )

    def state(self) -> dict[str, Any]:
        """What a worker that takes over between two items needs to report as this one would. Nothing is being read."""
        assert not self._readings
        now = time.perf_counter()
        bases = [base._replace(time=now - base.time) for base in (self._epoch_base, self._recent)]
        return {
            "images": self.images,
            "epoch_lr": self._epoch_lr,
            "losses": self._losses,
            "steps": self._steps,
            "bases": [tuple(base) for base in bases],
            "seconds": now - self._run_began,
            "counts": (self._stage.images_this_epoch, self._stage.images_evaluated),
            "unconfirmed": tuple(self._outlet.unconfirmed),
        }

    def take_over(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`. What may not have been heard of epochs is said again."""
        now = time.perf_counter()
        self.images, self._epoch_lr, self._losses = state["images"], state["epoch_lr"], state["losses"]
        self._steps = state["steps"]
        bases = (_Base(*base) for base in state["bases"])
        self._epoch_base, self._recent = (base._replace(time=now - base.time) for base in bases)
        self._run_began = now - state["seconds"]
        self._stage.images_this_epoch, self._stage.images_evaluated = state["counts"]
        for part in state["unconfirmed"]:
            self._outlet.epoch(part)

    def _begin(self, item: Item) -> None:
        self._epoch_lr = item.epoch
        self._stage.set_lr_factor(self._lr_factor(item.epoch))
        seen = self._stage.images_this_epoch
        sums = (0.0,) * len(self._stage.layers[-1].totals)
        if seen:  # resumed in the middle of an epoch
            sums = tuple(self._stage.layers[-1].totals.tolist())
        self._steps = 0
        self._recent = self._epoch_base = _Base(time.perf_counter(), self._stopwatch.waiting, seen, 0, sums)

    def _resolve(self, reading: _Reading) -> None:
        rows = reading.transfer.rows(reading.first_row, 2 * len(self._stage.layers) + 1)
        item, images, task = reading.item, reading.images, self._task
        for layer, row in zip(self._stage.layers, rows, strict=False):
            if not isfinite(row[0]):
                where = f" by epoch {item.epoch}, micro-batch {item.index}"
                error = NonFiniteLossError(layer.name, row[0], where)
                raise self._failure(f"{self._stage.index}U{item.position}", error) from error
        evaluation = rows[len(self._stage.layers)][0]
        if item.kind == "evaluate" and not isfinite(evaluation):
            raise self._evaluation_error(item, evaluation)
        self._losses = tuple(
            (layer.name, task.mean_loss(row, images)) for layer, row in zip(self._stage.layers, rows, strict=False)
        )
        if reading.ends_epoch:
            self._finish_epoch(reading, rows)
        if item.kind == "train" and self._stage.is_last:
            self._report_step(reading, tuple(rows[len(self._stage.layers) - 1]))

    def _evaluation_error(self, item: Item, loss: float) -> StageError:
        """A loss that is not finite ends a run here as in training: no learning rate, best or rank may read it."""
        layers = self._stage.layers
        broken = [name for layer in layers for name, value in layer.tensors() if not value.isfinite().all()]
        why = f" ({broken[0]} holds values that are not finite)" if broken else ""
        where = f" in the evaluation after epoch {item.epoch}{why}"
        return self._failure(f"{self._stage.index}E{item.position}", NonFiniteLossError(layers[-1].name, loss, where))

    def _failure(self, action: str, cause: Exception) -> StageError:
        layers = ", ".join(self._stage.layer_names)
        return StageError(rank=self._rank, stage=self._stage.index, layers=layers, action=action, cause=cause)

    def _report_step(self, reading: _Reading, sums: Sequence[float]) -> None:
        here = _Base(reading.time, reading.waiting, reading.images, reading.steps, tuple(sums))
        item = reading.item
        epoch_images = _Base(self._epoch_base.time, self._epoch_base.waiting, 0, 0, (0.0,) * len(sums))
        self._outlet.step(
            StepResult(
                epoch=item.epoch,
                step=item.index,
                steps=self._plan.steps_per_epoch,
                recent=self._meters(self._recent, here),
                mean=self._meters(epoch_images, here),
            )
        )
        self._recent = here

    def _ends_epoch(self, item: Item) -> bool:
        return item.last and item.kind == ("evaluate" if self._plan.eval_size else "train")

    def _finish_epoch(self, reading: _Reading, rows: list[list[float]]) -> None:
        train = evaluation = None
        layers = self._stage.layers
        if self._stage.is_last:
            train = self._scores(rows[len(layers) - 1], reading.images)
            if self._plan.eval_size:
                evaluation = self._scores(rows[len(layers)], reading.images_evaluated)
        accuracies = [
            (layer.name, accuracy)
            for layer, row in zip(layers, rows[len(layers) + 1 :], strict=True)
            if self._plan.eval_size and (layer.has_scores or layer.is_output)
            if (accuracy := self._scores(row, reading.images_evaluated).acc1) is not None
        ]
        self._outlet.epoch(
            EpochPart(
                stage=self._stage.index,
                epoch=reading.item.epoch,
                local_losses=self._losses,
                seconds=reading.time - self._epoch_base.time,
                train=train,
                evaluation=evaluation,
                layer_acc1=tuple(accuracies),
            )
        )

    def _scores(self, sums: Sequence[float], count: int) -> Scores:
        found = self._task.read(sums, count, self._sizes)
        return Scores(loss=found.loss, acc1=found.acc1, acc5=found.acc5, figures=found.others)

    def _meters(self, base: _Base, here: _Base) -> Meters:
        """Means between two readings."""
        steps = max(here.steps - base.steps, 1)
        sums = [b - a for a, b in zip(base.sums, here.sums, strict=True)]
        found = self._scores(sums, here.images - base.images)
        return Meters(
            time=(here.time - base.time) / steps,
            data=(here.waiting - base.waiting) / steps,
            loss=found.loss,
            acc1=found.acc1,
            acc5=found.acc5,
        )


def read_together(reporters: Sequence[StageReporter], items: Sequence[Item]) -> None:
    """Begins to read the sums of all stages, each as it is after its item, in one copy on the current stream, which
    comes after what the stages have done."""
    sums = [reporter.sums() for reporter in reporters]
    transfer, row = Transfer([one for of_stage in sums for one in of_stage], reporters[0].device), 0
    for reporter, item, of_stage in zip(reporters, items, sums, strict=True):
        reporter.expect(transfer, row, item)
        row += len(of_stage)


def images_trained(plan: StreamPlan, position: int) -> int:
    """Training images of the epoch that `position` lies in, before `position`."""
    if position >= len(plan):
        return 0
    epoch = plan[position].epoch
    first = plan.position_of_epoch(epoch)
    return sum(item.size for item in plan.items(first, position) if item.kind == "train")
