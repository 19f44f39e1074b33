"""The report's figures as TensorBoard's event files: one run per contender and seed."""

import re
from pathlib import Path

from unlocked.comparison.results import Report
from unlocked.runtime.metrics.tensorboard import require_tensorboard

__all__ = ["write_board"]


def write_board(report: Report, folder: Path) -> None:
    """Below `folder`: for every contender `speed/images_per_second` by repeat, and for every seed of it the epochs'
    `accuracy/test` (percent), `loss/test` and `loss/train`, at the seconds of training that they were reached.

    Raises:
        ValueError: the package tensorboard is not installed.
    """
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    for contender in report.measured:
        name = re.sub(r"[^\w.-]+", "_", contender.name)
        with SummaryWriter(str(folder / name)) as writer:
            for number, run in enumerate(contender.speed_runs):
                writer.add_scalar("speed/images_per_second", run.images_per_second, number)
        for run in contender.accuracy_runs:
            with SummaryWriter(str(folder / name / f"seed-{run.seed}")) as writer:
                for epoch in run.epochs:
                    values = {
                        "accuracy/test": epoch.test_acc1,
                        "loss/test": epoch.test_loss,
                        "loss/train": epoch.train_loss,
                    }
                    for tag, value in values.items():
                        if value is not None:
                            writer.add_scalar(tag, value, epoch.epoch + 1, walltime=epoch.seconds)
