"""An end of the run where a figure has stopped to become better."""

from collections.abc import Mapping
from math import isfinite
from numbers import Integral
from typing import Any

from unlocked.runtime.metrics.records import EpochResult, RunInfo
from unlocked.runtime.metrics.sinks import MetricsSink

__all__ = ["FIGURES", "EarlyStopping"]

FIGURES: Mapping[str, bool] = {
    **dict.fromkeys(("eval_loss", "train_loss"), False),
    **dict.fromkeys(("eval_acc1", "eval_acc5", "train_acc1", "train_acc5"), True),
}
"""A figure of an epoch -> whether more of it is better."""
_LESS = ("perplexity", "bits_per_byte", "mae", "rmse", "loss")


class EarlyStopping(MetricsSink):
    """A metrics sink that stops the run after `patience` epochs without a better figure.

    The run ends with the last epoch that was trained, on every engine with the same weights: the pipeline drains at the
    end of every epoch. `Trainer(best_dir=...)` keeps the weights of the best one. A resumed run counts anew.

    Args:
        patience: epochs, at least 1.
        figure: of `EpochResult`, one of `FIGURES`; or of the run's task, called eval_NAME, such as eval_mae.
        more_is_better: of a task's figure. None: not of a loss, perplexity, bits_per_byte, mae or rmse.
        min_delta: by how much a figure must be better to count.

    Raises:
        ValueError: an argument is out of range.
    """

    waits_at_epochs = True

    def __init__(
        self, patience: int, *, figure: str = "eval_loss", min_delta: float = 0.0, more_is_better: bool | None = None
    ) -> None:
        count: Any = patience
        if isinstance(count, bool) or not isinstance(count, Integral) or int(count) < 1:
            raise ValueError(f"patience is {patience!r}; it must be a whole number of at least 1")
        own = isinstance(figure, str) and figure.startswith("eval_")
        if figure not in FIGURES and not own:
            raise ValueError(f"figure {figure!r} is not known; valid: {', '.join(FIGURES)}")
        if more_is_better is None:
            more_is_better = FIGURES.get(figure, figure.removeprefix("eval_") not in _LESS)
        if not (isinstance(min_delta, int | float) and isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta is {min_delta!r}; it must be a finite number of at least 0")
        self.patience, self.figure, self.min_delta, self.more = patience, figure, min_delta, more_is_better
        self.on_start(None)

    def on_start(self, info: RunInfo | None) -> None:
        self.best: float | None = None
        """The best figure so far; None: there was no epoch."""
        self.best_epoch: int | None = None
        if info is not None and self.figure not in FIGURES and self.figure.removeprefix("eval_") not in info.figures:
            valid = ", ".join([*FIGURES, *(f"eval_{name}" for name in info.figures)])
            raise ValueError(f"figure {self.figure!r} is not known to the task {info.task}; valid: {valid}")
        if info is not None and not info.evaluates and self.figure.startswith("eval_"):
            raise ValueError(f"an epoch has no {self.figure} without an evaluation; give fit(eval_data=...)")

    def on_epoch(self, result: EpochResult) -> None:
        known = self.figure in FIGURES
        value = getattr(result, self.figure) if known else result.figure(self.figure.removeprefix("eval_"))
        if value is None:
            raise ValueError(f"an epoch has no {self.figure} without an evaluation; give fit(eval_data=...)")
        gain = 0.0 if self.best is None else value - self.best if self.more else self.best - value
        if self.best is None or self.best_epoch is None or gain > self.min_delta:
            self.best, self.best_epoch = value, result.epoch
        elif result.epoch - self.best_epoch >= self.patience:
            self.stop(
                f"early stop after epoch {result.epoch + 1}: {self.figure} was best in epoch {self.best_epoch + 1}, "
                f"{self.best:.4g}"
            )
