"""The stream of a whole run as arithmetic: which item stands at which position, without a list of them.

An epoch is: its training micro-batches, with a snapshot mark after every `snapshot_every`-th training step of the run;
then the statistics micro-batches; then the evaluation micro-batches. Epochs follow each other without a seam.
"""

import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from unlocked.runtime.fields import LARGEST, check, setting
from unlocked.workers.actions import Item, ItemKind

__all__ = ["StreamPlan"]

_LARGEST_SIZE = 2**40  # rows of a dataset, which a loader may have


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """The order of everything that passes through the pipeline, with random access.

    `plan[position]` costs O(log epochs) and nothing is stored, so that every stage (or machine) can hold the whole
    plan, and a resumed run starts at any position. A partial last micro-batch is kept unless `drop_last`, never padded.

    Attributes:
        epochs: passes over the training data.
        train_size: rows of training data.
        batch_size: rows of a training or statistics micro-batch; the last of an epoch holds what is left over.
        drop_last: leave out what is left over, as a PyTorch DataLoader does: of the training and statistics
            micro-batches; all of the evaluation data is always scored.
        eval_size: rows of evaluation data; 0 = no evaluation (and then no statistics either).
        eval_batch_size: rows of an evaluation micro-batch. More than `eval_size` means one smaller micro-batch.
        statistics_batches: how many of the epoch's micro-batches re-estimate the BatchNorm statistics before each
            evaluation, at most `steps_per_epoch`. The i-th has the size of the epoch's i-th training micro-batch.
        snapshot_every: a snapshot mark follows every that many training micro-batches of the run; 0 = never.
        max_steps: stop after that many training micro-batches; None = after `epochs`. The epoch in which the run
            stops is cut, and is still evaluated.

    Raises:
        ValueError: a number out of its range, or a micro-batch larger than the training data.
    """

    epochs: int = setting(help="of training", at_least=1, at_most=LARGEST)
    train_size: int = setting(help="rows of training data", at_least=1, at_most=_LARGEST_SIZE)
    batch_size: int = setting(help="rows of a micro-batch", at_least=1, at_most=LARGEST)
    eval_size: int = setting(0, "rows of evaluation data", at_least=0, at_most=_LARGEST_SIZE)
    eval_batch_size: int = setting(1000, "rows of an evaluation micro-batch", at_least=1, at_most=LARGEST)
    statistics_batches: int = setting(50, "before each evaluation", at_least=0, at_most=LARGEST)
    snapshot_every: int = setting(0, "training micro-batches", at_least=0, at_most=LARGEST)
    max_steps: int | None = setting(None, "None: train for all epochs", at_least=1, at_most=LARGEST)
    drop_last: bool = setting(False, "leave out an epoch's last training micro-batch where it would be smaller")

    def __post_init__(self) -> None:
        check(self)
        if self.batch_size > self.train_size:
            raise ValueError(
                f"batch_size={self.batch_size} is larger than the training data, which has {self.train_size} rows. "
                f"Choose a batch_size of at most {self.train_size}."
            )
        if self._marked(self.train_steps) + self.num_epochs * self._tail > sys.maxsize:
            raise ValueError(
                f"{self.epochs} epochs of {self.steps_per_epoch} micro-batches are more than can be counted"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Training micro-batches of an uncut epoch."""
        whole, rest = divmod(self.train_size, self.batch_size)
        return whole if self.drop_last else whole + (rest > 0)

    @property
    def train_steps(self) -> int:
        """Training micro-batches of the whole run."""
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs that the run enters: fewer than `epochs` where `max_steps` ends it earlier."""
        return -(-self.train_steps // self.steps_per_epoch)

    @property
    def statistics_per_epoch(self) -> int:
        """Statistics micro-batches before each evaluation."""
        return min(self.statistics_batches, self.steps_per_epoch) if self.eval_size else 0

    @property
    def evaluations_per_epoch(self) -> int:
        """Evaluation micro-batches of an epoch."""
        return -(-self.eval_size // self.eval_batch_size)

    @property
    def max_rows(self) -> int:
        """Rows of the largest micro-batch of any kind: what a slot must hold."""
        return max(self.batch_size, min(self.eval_batch_size, self.eval_size))

    def sizes(self, kind: ItemKind) -> set[int]:
        """The numbers of rows that micro-batches of this kind have in the run."""
        steps, rows = self.steps_per_epoch, self.train_size
        if kind == "train":
            count, batch = min(steps, self.train_steps), self.batch_size
        elif kind == "statistics":
            count, batch = self.statistics_per_epoch, self.batch_size
        else:
            count, batch, rows = self.evaluations_per_epoch, self.eval_batch_size, self.eval_size
        return {min(batch, rows - index * batch) for index in (0, count - 1) if count} if kind != "snapshot" else set()

    def __len__(self) -> int:
        # The position of the step after the last one, were there one; every epoch entered has its tail by then.
        return self._marked(self.train_steps) + self.num_epochs * self._tail

    def __getitem__(self, position: int) -> Item:
        """The item at `position`; negative positions count from the end.

        Raises:
            IndexError: no such position.
        """
        length = len(self)
        if not -length <= position < length:
            raise IndexError(f"position {position} is outside the plan, which has {length} items (0 to {length - 1}).")
        return self._item(position % length)

    def __iter__(self) -> Iterator[Item]:
        return self.items()

    def items(self, start: int = 0, stop: int | None = None) -> Iterator[Item]:
        """The items at positions `start`, ..., `stop` - 1 (`stop` None: to the end).

        Raises:
            ValueError: the window is not inside the plan.
        """
        length = len(self)
        end = length if stop is None else stop
        if not 0 <= start <= end <= length:
            raise ValueError(f"window {start} to {end} is not inside the plan, which has {length} items.")
        return map(self._item, range(start, end))

    def settings(self) -> dict[str, int]:
        """What makes a position mean the same micro-batch in another run; the number of epochs does not."""
        return {
            "train_size": self.train_size,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "eval_size": self.eval_size,
            "eval_batch_size": self.eval_batch_size,
            "statistics_batches": self.statistics_per_epoch,
        }

    def position_of_epoch(self, epoch: int) -> int:
        """The position of the first item of `epoch`.

        Raises:
            ValueError: the run has no such epoch.
        """
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch {epoch} is outside the run, which has epochs 0 to {self.num_epochs - 1}.")
        return self._epoch_start(epoch)

    def end_of_epoch(self, epoch: int) -> int:
        """The position after the last item of `epoch`.

        Raises:
            ValueError: the run has no such epoch.
        """
        self.position_of_epoch(epoch)  # raises where there is none
        return self._epoch_start(epoch + 1) if epoch + 1 < self.num_epochs else len(self)

    def resumable(self, position: int) -> int:
        """The first position, from `position` on, at which a run can be stopped and resumed: not amid an evaluation,
        whose sums are not saved."""
        if position >= len(self) or self[position].kind in ("train", "snapshot"):
            return position
        if position and self[position - 1].kind in ("train", "snapshot"):
            return position
        return self.end_of_epoch(self[position].epoch)

    @property
    def _tail(self) -> int:
        """Items after an epoch's training part."""
        return self.statistics_per_epoch + self.evaluations_per_epoch

    def _snapshots(self, steps: int) -> int:
        """Snapshot marks among the first `steps` training steps of the run and right after them."""
        return steps // self.snapshot_every if self.snapshot_every else 0

    def _marked(self, steps: int) -> int:
        """Training and snapshot items up to and with the first `steps` steps: the position if there were no tails."""
        return steps + self._snapshots(steps)

    def _epoch_start(self, epoch: int) -> int:
        return self._marked(epoch * self.steps_per_epoch) + epoch * self._tail

    def _item(self, position: int) -> Item:
        epoch = bisect_right(range(self.num_epochs), position, key=self._epoch_start) - 1
        first = epoch * self.steps_per_epoch
        stop = min(first + self.steps_per_epoch, self.train_steps)
        # The place in the stream of training steps and snapshot marks alone, where marks stand at a fixed period.
        marked = position - epoch * self._tail
        beyond = marked - self._marked(stop)
        if beyond >= 0:
            return self._tail_item(position, epoch, beyond)
        period = self.snapshot_every + 1
        if self.snapshot_every and marked % period == self.snapshot_every:
            index = marked // period - self._snapshots(first)
            count = self._snapshots(stop) - self._snapshots(first)
            return Item(position, "snapshot", epoch, index, 0, index == count - 1)
        index = marked - (marked // period if self.snapshot_every else 0) - first
        return self._data_item(position, "train", epoch, index, stop - first, self.batch_size, self.train_size)

    def _tail_item(self, position: int, epoch: int, index: int) -> Item:
        statistics = self.statistics_per_epoch
        if index < statistics:
            return self._data_item(position, "statistics", epoch, index, statistics, self.batch_size, self.train_size)
        return self._data_item(
            position,
            "evaluate",
            epoch,
            index - statistics,
            self.evaluations_per_epoch,
            self.eval_batch_size,
            self.eval_size,
        )

    @staticmethod
    def _data_item(position: int, kind: ItemKind, epoch: int, index: int, count: int, batch: int, rows: int) -> Item:
        return Item(position, kind, epoch, index, min(batch, rows - index * batch), index == count - 1)
