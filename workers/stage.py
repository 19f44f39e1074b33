"""A stage: one or more contiguous layers, one worker. It knows its actions, not when they happen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unlocked.workers.actions import Item
from unlocked.workers.cargo import Cargo
from unlocked.workers.layer import Layer, as_delivered, count_correct
from unlocked.workers.source import Source

__all__ = ["Stage"]


class Stage:
    """Contiguous layers that run one after the other in one worker.

    Inside a stage every layer but the last updates as soon as its output is there, so the stage holds the saved
    activations of one layer at a time, whatever its depth; only the last layer's update waits for SEND.
    """

    def __init__(self, index: int, layers: Sequence[Layer], source: Source | None = None) -> None:
        self.index, self.layers, self.source = index, list(layers), source
        self._labels: Tensor | None = None
        self.images_this_epoch = 0
        self.images_evaluated = 0

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def is_last(self) -> bool:
        return self.layers[-1].is_output

    def load(self, item: Item) -> tuple[Tensor, Tensor]:
        """Stage 0's RECV: the micro-batch out of the dataset."""
        assert self.source is not None
        x, labels = self.source.load(item)
        return as_delivered(x.activations if isinstance(x, Cargo) else x), labels  # named tensors that nobody reads

    def close(self) -> None:
        """Lets go of the data: nothing more is loaded. Idempotent."""
        if self.source is not None:
            self.source.close()

    def forward(self, item: Item, x: Tensor, labels: Tensor, out: Tensor | None = None) -> Tensor:
        """Action F: returns the next stage's input, in `out` if given."""
        if item.kind == "statistics":
            return self._infer(x, "statistics", out)
        self._labels = labels
        for layer in self.layers[:-1]:
            x = layer.forward(x)
            layer.update(labels)
        return self.layers[-1].forward(x, out)

    def update(self, item: Item) -> None:
        """Action U: the last layer's local update."""
        assert self._labels is not None
        self.layers[-1].update(self._labels)
        self._labels = None

    def evaluate(self, item: Item, x: Tensor, labels: Tensor, out: Tensor | None = None) -> Tensor:
        """Action E: eval-mode forward; the last stage adds up loss and correct counts on the device."""
        for layer in self.layers:
            x, scores = layer.evaluate(x)
            if scores is not None:
                layer.score(scores, labels)
        if self.is_last:
            self._finish_evaluation(x, labels, x)
        return x if out is None else out.copy_(x)

    def infer(self, x: Any) -> Tensor:
        """What the network gives in eval mode for what `load` gave."""
        return self._infer(x, "evaluate", None)

    def set_lr_factor(self, factor: float) -> None:
        for layer in self.layers:
            layer.set_lr_factor(factor)

    def count(self, item: Item, items: int = 1) -> None:
        """Tells the stage that `item` is done, or so many like it: how many images its sums hold is known without
        asking the device."""
        if item.kind == "train":
            self.images_this_epoch += items * item.size
        elif item.kind == "evaluate":
            self.images_evaluated += items * item.size

    def sums(self) -> list[Tensor]:
        """All sums, on the device, each float64 as the task has them. A layer's are, of a classification, (loss,
        correct, correct among the first five) over `images_this_epoch`; then come the evaluation's over
        `images_evaluated`; then each layer's own prediction's, (0, correct, correct among the first five)."""
        layers = self.layers
        return [*(one.totals for one in layers), layers[-1].eval_totals, *(one.score_totals for one in layers)]

    def begin_epoch(self) -> None:
        """The sums start anew."""
        for layer in self.layers:
            layer.totals.zero_()
            layer.score_totals.zero_()
        self.layers[-1].eval_totals.zero_()
        self.images_this_epoch = self.images_evaluated = 0

    def resume_epoch(self, images_seen: int) -> None:
        """Tells a stage that was restored in the middle of an epoch how many images its sums hold."""
        self.images_this_epoch = images_seen

    @torch.no_grad()
    def _finish_evaluation(self, outputs: Tensor, labels: Tensor, result: Tensor) -> None:
        """On the last stage: what the output layer gives, and what the run predicts."""
        output = self.layers[-1]
        sums = output.score(outputs, labels)
        if not output.classifies:
            output.eval_totals += sums
            return
        output.eval_totals[0] += torch.nn.functional.cross_entropy(result, labels, reduction="sum")
        output.eval_totals[1:] += count_correct(result, labels)

    def _infer(self, x: Tensor, mode: str, out: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer.infer(x, mode)
        return x if out is None else out.copy_(x)
