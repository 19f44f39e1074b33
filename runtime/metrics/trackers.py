"""Experiment trackers as metrics sinks: MLflow, Weights & Biases and Trackio, each to local files, without a network.

Their packages are extras of this one, and are imported when a sink is made. All get a run's settings, its figures per
epoch and while it runs, and what other sinks tell. Names and steps are those of `TensorBoard`, but for MLflow's, which
are those of the LLS authors' code.
"""

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unlocked.runtime.metrics.records import EpochResult, Metric, RunInfo, StepResult
from unlocked.runtime.metrics.sinks import MetricsSink

__all__ = ["TRACKERS", "MLflow", "Trackio", "Wandb", "require_tracker"]


def require_tracker(name: str) -> None:
    """Raises: ValueError: the package of the tracker `name`, of `TRACKERS`, is not installed."""
    try:
        found = importlib.util.find_spec(name)
    except ValueError:  # of a module that is there without one
        found = None
    if found is None:
        raise ValueError(f"--{name} needs the package {name}; pip install 'unlocked[{name}]'")


def _imported(name: str) -> Any:
    """The tracker's package, kept from the network and the terminal."""
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--{name} needs the package {name}, which can't be imported: {error}") from error


class _Tracker(MetricsSink):
    """What the three have in common.

    Args:
        path: the folder that the tracker writes to; made if it does not exist.
        experiment: what the run belongs to: a project, or MLflow's experiment.
        run: its name.
        settings: of the run, JSON values.

    Raises:
        ValueError: the package is not installed, or the folder can't be made.
    """

    name = ""

    def __init__(
        self,
        path: str | Path,
        *,
        experiment: str = "unlocked",
        run: str = "run",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.experiment, self.run = Path(path).absolute(), experiment, run
        self.settings = {key: value for key, value in (settings or {}).items() if value is not None}
        require_tracker(self.name)
        self._package = _imported(self.name)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{self.name} {self.path} can't be written ({error}); give a folder of yours") from error

    def on_step(self, step: StepResult) -> None:
        done = step.epoch * step.steps + step.step + 1
        recent = step.recent
        values = {"loss": recent.loss, "accuracy": recent.acc1, "seconds": recent.time, "waiting": recent.data}
        self._log({f"steps/{name}": value for name, value in values.items() if value is not None}, done)

    def on_epoch(self, result: EpochResult) -> None:
        self._log({"epoch": result.epoch + 1, **figures_of_epoch(result)}, None)

    def on_metric(self, metric: Metric) -> None:
        self._log({"epoch": metric.epoch + 1, metric.name: metric.value}, None)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        self._end(failed=False)

    def on_failure(self, error: BaseException) -> None:
        self._end(failed=True)

    def _log(self, values: Mapping[str, float], step: int | None) -> None:
        raise NotImplementedError

    def _end(self, *, failed: bool) -> None:
        raise NotImplementedError


def figures_of_epoch(result: EpochResult) -> dict[str, float]:
    """An epoch's figures by the names that TensorBoard's files have them under; those that there are."""
    values = {
        "loss/train": result.train_loss,
        "loss/test": result.eval_loss,
        "accuracy/train": result.train_acc1,
        "accuracy/test": result.eval_acc1,
        "time/epoch": result.seconds,
        **{f"local_loss/{layer}": loss for layer, loss in result.local_losses},
        **{f"{name}/train": value for name, value in result.train_figures},
        **{f"{name}/test": value for name, value in result.eval_figures},
    }
    return {name: value for name, value in values.items() if value is not None}


class MLflow(_Tracker):
    """Logs to `path`/mlflow.db, which `mlflow ui --backend-store-uri sqlite:///PATH/mlflow.db` shows.

    Parameters and figures have the names of the authors' code: `acc_train`, `acc_test`, `loss_test`, ... by epoch from
    0, `best_acc_test` at the end, and our others under our own. See `_Tracker` for the arguments.
    """

    name = "mlflow"

    def on_start(self, info: RunInfo) -> None:
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        self._client = self._package.MlflowClient(tracking_uri=f"sqlite:///{self.path}/mlflow.db")
        found = self._client.get_experiment_by_name(self.experiment)
        place = (self.path / "artifacts").as_uri()
        known = found.experiment_id if found else self._client.create_experiment(self.experiment, place)
        self._id = self._client.create_run(known, run_name=self.run).info.run_id
        self._best: float | None = None
        told = {_PARAMETERS.get(name, name): value for name, value in self.settings.items()}
        for name, value in (told | {"engine": info.engine}).items():
            self._client.log_param(self._id, name, value)

    def on_epoch(self, result: EpochResult) -> None:
        values = {
            "acc_train": result.train_acc1,
            "acc_train_top5": result.train_acc5,
            "loss_train": result.train_loss,
            "acc_test": result.eval_acc1,
            "acc_test_top5": result.eval_acc5,
            "loss_test": result.eval_loss,
            **{f"{name}_train": value for name, value in result.train_figures},
            **{f"{name}_test": value for name, value in result.eval_figures},
            **{f"local_loss/{layer}": loss for layer, loss in result.local_losses},
        }
        if result.eval_acc1 is not None:
            self._best = max(self._best or 0.0, result.eval_acc1)
        self._log({name: value for name, value in values.items() if value is not None}, result.epoch)

    def on_metric(self, metric: Metric) -> None:
        self._log({metric.name: metric.value}, metric.epoch)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        if self._best is not None:
            self._log({"best_acc_test": self._best}, None)
        super().on_finish(summary)

    def _log(self, values: Mapping[str, float], step: int | None) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def _end(self, *, failed: bool) -> None:
        if hasattr(self, "_id"):
            self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")


class Wandb(_Tracker):
    """Writes an offline run of Weights & Biases below `path`/wandb; `wandb sync` uploads it if that is wanted.

    See `_Tracker` for the arguments.
    """

    name = "wandb"

    def on_start(self, info: RunInfo) -> None:
        package = self._package
        self._run = package.init(
            project=self.experiment,
            name=self.run,
            dir=str(self.path),
            config=self.settings | {"engine": info.engine},
            mode="offline",
            reinit="create_new",
            settings=package.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        self._run.define_metric("steps/*", step_metric="steps/done")

    def _log(self, values: Mapping[str, float], step: int | None) -> None:
        self._run.log(dict(values) if step is None else {**values, "steps/done": step})

    def _end(self, *, failed: bool) -> None:
        if hasattr(self, "_run"):
            self._run.finish(exit_code=int(failed))


class Trackio(_Tracker):
    """Writes `path`/PROJECT.db, which `TRACKIO_DIR=PATH trackio show` shows. One folder per process.

    See `_Tracker` for the arguments.
    """

    name = "trackio"

    def __init__(self, path: str | Path, **options: Any) -> None:
        os.environ["TRACKIO_DIR"] = str(Path(path).absolute())  # read when the package is imported
        super().__init__(path, **options)
        place = Path(importlib.import_module("trackio.utils").TRACKIO_DIR)
        if place != self.path:
            raise ValueError(
                f"--trackio {self.path} comes too late: this process has imported trackio, which writes to {place}; "
                "set TRACKIO_DIR before that, or give that folder"
            )

    def on_start(self, info: RunInfo) -> None:
        with _silently():
            self._run = self._package.init(
                project=self.experiment,
                name=self.run,
                config=self.settings | {"engine": info.engine},
                resume="never",
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def _log(self, values: Mapping[str, float], step: int | None) -> None:
        self._run.log(dict(values) if step is None else {**values, "steps/done": step})

    def _end(self, *, failed: bool) -> None:
        if hasattr(self, "_run"):
            with _silently():
                self._package.finish()


TRACKERS: Mapping[str, type[_Tracker]] = {one.name: one for one in (MLflow, Wandb, Trackio)}
"""The name of a tracker's package, which is also that of its flag and of its extra -> its sink."""

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""What keeps them from the network and from the terminal; whatever the user has set goes before it."""
_PARAMETERS = {"lr": "learning_rate"}


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield
