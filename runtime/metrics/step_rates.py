"""Learning rates that change with every training micro-batch, set before each."""

from collections.abc import Callable

from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item
from unlocked.workers.stage import Stage

__all__ = ["set_rates_per_step"]


def set_rates_per_step(
    reporter: StageReporter, stage: Stage, plan: StreamPlan, factor: Callable[[int, int], float]
) -> None:
    """From now on what `reporter` does before an item also sets the stage's rate.

    Args:
        factor: (epoch, training micro-batch of the run) -> what the rate is multiplied by.
    """
    plain, steps = reporter.before, plan.steps_per_epoch

    def before(item: Item) -> None:
        plain(item)
        if item.kind == "train":
            stage.set_lr_factor(factor(item.epoch, item.epoch * steps + item.index))

    reporter.before = before  # type: ignore[method-assign]
