"""The stream of a whole run as arithmetic: which item stands at which position, without a list of them.

An epoch is: its training micro-batches; then the statistics micro-batches; then the evaluation micro-batches. Epochs
follow each other without a seam. A snapshot mark takes no position: it stands behind a training micro-batch,
every `snapshot_every`-th of the run or one that the clock chose, so that a position means the same wherever marks are.
"""

import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

from unlocked.runtime.fields import LARGEST, check, setting
from unlocked.workers.actions import Item, ItemKind

__all__ = ["StreamPlan"]

_LARGEST_SIZE = 2**40  # rows of a dataset, which a loader may have


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """The order of everything that passes through the pipeline, with random access.

    `plan[position]` costs O(1) and nothing is stored, so that every stage (or machine) can hold the whole
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
        if self.train_steps + self.num_epochs * self._tail > sys.maxsize:
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
        return self.train_steps + self.num_epochs * self._tail

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

    def items(self, start: int = 0, stop: int | None = None, marks: Set[int] = frozenset()) -> Iterator[Item]:
        """The items at positions `start`, ..., `stop` - 1 (`stop` None: to the end), and the marks behind them.

        Args:
            marks: positions of training micro-batches behind which the clock has set one.

        Raises:
            ValueError: the window is not inside the plan.
        """
        length = len(self)
        end = length if stop is None else stop
        if not 0 <= start <= end <= length:
            raise ValueError(f"window {start} to {end} is not inside the plan, which has {length} items.")
        return self._marked_items(start, end, marks)

    def _marked_items(self, start: int, end: int, marks: Set[int]) -> Iterator[Item]:
        for position in range(start, end):
            item = self._item(position)
            yield item
            if self._is_marked(item, marks):
                yield replace(item, kind="snapshot", size=0, last=False)

    def has_mark(self, start: int, stop: int, marks: Set[int] = frozenset()) -> bool:
        """Whether there is a mark behind any of the positions `start`, ..., `stop` - 1."""
        if any(start <= mark < stop for mark in marks):
            return True
        every = self.snapshot_every
        return bool(every) and self.steps_before(start) // every < self.steps_before(stop) // every

    def steps_before(self, position: int) -> int:
        """Training micro-batches before `position`, over the whole run; as if it had begun at a position below 0."""
        if position >= len(self):
            return self.train_steps
        epoch = max(position, 0) // (self.steps_per_epoch + self._tail)
        index = max(position, 0) - self._epoch_start(epoch)
        return min(epoch * self.steps_per_epoch + min(index, self.steps_per_epoch), self.train_steps)

    def next_training(self, position: int) -> int | None:
        """The position of the first training micro-batch from `position` on, if there is one."""
        if position < len(self) and self[position].kind != "train":
            position = self.end_of_epoch(self[position].epoch)
        return position if position < len(self) else None

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
        if position >= len(self) or self[position].kind == "train":
            return position
        if position and self[position - 1].kind == "train":
            return position
        return self.end_of_epoch(self[position].epoch)

    @property
    def _tail(self) -> int:
        """Items after an epoch's training part."""
        return self.statistics_per_epoch + self.evaluations_per_epoch

    def _epoch_start(self, epoch: int) -> int:
        return epoch * (self.steps_per_epoch + self._tail)

    def _is_marked(self, item: Item, marks: Set[int]) -> bool:
        if item.kind != "train":
            return False
        step = item.epoch * self.steps_per_epoch + item.index + 1
        return item.position in marks or bool(self.snapshot_every and step % self.snapshot_every == 0)

    def _item(self, position: int) -> Item:
        epoch = min(position // (self.steps_per_epoch + self._tail), self.num_epochs - 1)
        first = epoch * self.steps_per_epoch
        count = min(self.steps_per_epoch, self.train_steps - first)
        index = position - self._epoch_start(epoch)
        if index >= count:
            return self._tail_item(position, epoch, index - count)
        return self._data_item(position, "train", epoch, index, count, self.batch_size, self.train_size)

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
