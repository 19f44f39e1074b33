"""The sinks of a run by names: what the command line's flags and a recipe's settings ask for."""

import contextlib
from pathlib import Path
from typing import Any

from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.early_stopping import EarlyStopping
from unlocked.runtime.metrics.run_log import RunLog
from unlocked.runtime.metrics.sinks import MetricsSink
from unlocked.runtime.metrics.tensorboard import TensorBoard, require_tensorboard
from unlocked.runtime.metrics.trackers import TRACKERS, require_tracker
from unlocked.runtime.saving.folder_lock import hold_folder
from unlocked.runtime.saving.snapshots import sweep_unfinished

__all__ = ["make_sinks", "require_packages"]


def require_packages(recipe: Any) -> None:
    """Raises: ValueError: the package of a tracker that the recipe has a folder for is not installed."""
    if recipe.tensorboard is not None:
        require_tensorboard()
    for name in TRACKERS:
        if getattr(recipe, name) is not None:
            require_tracker(name)


def make_sinks(recipe: Any, folder: Path | None, held: contextlib.ExitStack) -> list[MetricsSink]:
    """Called where the run reports: in the only process, or in rank 0's. That one has the run's folder, until `held`
    closes."""
    made: list[MetricsSink] = [Dashboard(plain=True if recipe.plain else None)]
    config = recipe.config()
    if folder is not None:
        held.enter_context(hold_folder(folder))
        sweep_unfinished(folder)
        made.append(RunLog(folder, config, resume=recipe.resume is not None))
    if recipe.tensorboard is not None:
        made.append(TensorBoard(recipe.tensorboard / recipe.run_name))
    for name, tracker in TRACKERS.items():
        if (path := getattr(recipe, name)) is not None:
            experiment = recipe.experiment_name or "unlocked"
            made.append(tracker(path, experiment=experiment, run=recipe.run_name, settings=config))
    if recipe.early_stop is not None:
        made.append(EarlyStopping(recipe.early_stop))
    return made
