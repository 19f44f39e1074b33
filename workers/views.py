"""A rule's rows of the data, made by stage 0 out of every micro-batch that it loads."""

import torch
from torch import Tensor

from unlocked.data import epoch_order
from unlocked.kernels.philox import Purpose, keyed_uniform
from unlocked.rules import Views
from unlocked.workers.actions import Item

__all__ = ["ViewMaker"]


class ViewMaker:
    """Makes them; what is drawn is keyed by (seed, epoch, sample) and nothing else.

    Args:
        train_size: samples of a training set that is read in the run's usual order; None: of a loader's, or of one by
            classes, the n-th sample that an epoch yields is sample n.
        batch_size: rows of a full training micro-batch.
    """

    def __init__(self, views: Views, *, seed: int, num_classes: int, train_size: int | None, batch_size: int) -> None:
        self.views, self._seed, self._num_classes = views, seed, num_classes
        self._train_size, self._batch_size = train_size, batch_size
        self._order: tuple[tuple[Purpose, int], Tensor] | None = None

    def make(self, item: Item, x: Tensor, labels: Tensor) -> Tensor:
        """Rows [views * B, ...] of the samples [B, ...] of a train, statistics or evaluation item."""
        if item.kind == "evaluate":
            return self.views.make_evaluation(x, self._num_classes)
        samples = self._samples(item).to(x.device)
        block = 0
        left: list[Tensor] = []

        def draw(count: int) -> Tensor:
            nonlocal block
            while sum(one.shape[1] for one in left) < count:
                left.append(keyed_uniform(self._seed, Purpose.VIEWS, samples, item.epoch, block))
                block += 1
            drawn = torch.cat(left, 1)
            left[:] = [drawn[:, count:]]
            return drawn[:, :count]

        return self.views.make(x, labels, draw, self._num_classes)

    def probed(self, x: Tensor, samples: int) -> Tensor:
        """The rows [samples, ...] that the output layer sees of [views * samples, ...]."""
        view = self.views.probe % (len(x) // samples)
        return x[view * samples : (view + 1) * samples]

    def _samples(self, item: Item) -> Tensor:
        """The sample's number in the training set, of every row; int64 [B]."""
        start = item.index * self._batch_size
        if self._train_size is None:
            return torch.arange(start, start + item.size)
        purpose = Purpose.STATISTICS if item.kind == "statistics" else Purpose.SHUFFLE
        if self._order is None or self._order[0] != (purpose, item.epoch):
            cpu = torch.device("cpu")
            order = epoch_order(self._train_size, self._seed, item.epoch, cpu, purpose)
            self._order = ((purpose, item.epoch), order)
        return self._order[1][start : start + item.size]
