"""What happens when: the schedule as data, the partitioner, the coordinator, the engines, and the public `Trainer`.

Names are imported on first use, so that schedules can be built and simulated where torch is not installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlocked.runtime.engines.processes.engine import Processes
    from unlocked.runtime.engines.sequential import Sequential
    from unlocked.runtime.engines.streams.engine import Streams
    from unlocked.runtime.explaining import Explanation
    from unlocked.runtime.learning_rate import PerStep, ReduceLROnPlateau, WarmUp
    from unlocked.runtime.metrics.csv_file import CsvFile
    from unlocked.runtime.metrics.early_stopping import EarlyStopping
    from unlocked.runtime.metrics.sinks import MetricsSink
    from unlocked.runtime.metrics.trackers import MLflow, Trackio, Wandb
    from unlocked.runtime.prediction import Evaluation
    from unlocked.runtime.result import RunResult
    from unlocked.runtime.trainer import Trainer

__all__ = [
    "CsvFile",
    "EarlyStopping",
    "Evaluation",
    "Explanation",
    "MLflow",
    "MetricsSink",
    "PerStep",
    "Processes",
    "ReduceLROnPlateau",
    "RunResult",
    "Sequential",
    "Streams",
    "Trackio",
    "Trainer",
    "Wandb",
    "WarmUp",
]

_HOMES = {
    "Evaluation": "unlocked.runtime.prediction",
    "Explanation": "unlocked.runtime.explaining",
    "CsvFile": "unlocked.runtime.metrics.csv_file",
    "EarlyStopping": "unlocked.runtime.metrics.early_stopping",
    **dict.fromkeys(("MLflow", "Trackio", "Wandb"), "unlocked.runtime.metrics.trackers"),
    "MetricsSink": "unlocked.runtime.metrics.sinks",
    "Processes": "unlocked.runtime.engines.processes.engine",
    "PerStep": "unlocked.runtime.learning_rate",
    "ReduceLROnPlateau": "unlocked.runtime.learning_rate",
    "WarmUp": "unlocked.runtime.learning_rate",
    "RunResult": "unlocked.runtime.result",
    "Sequential": "unlocked.runtime.engines.sequential",
    "Streams": "unlocked.runtime.engines.streams.engine",
    "Trainer": "unlocked.runtime.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
