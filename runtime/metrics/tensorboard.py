"""TensorBoard's event files of a run: a metrics sink. Needs the package `tensorboard`.

Per epoch (the step is the number of finished epochs): `loss/train`, `loss/test`, `accuracy/train`, `accuracy/test` in
percent, `time/epoch` in seconds, one `local_loss/LAYER` per layer, and `layer_accuracy/LAYER` in percent, on the test
data, of each layer that makes a prediction of its own. While it runs (the step is the number of
training micro-batches done): `steps/loss`, `steps/accuracy`, `steps/seconds`, of which `steps/waiting`.
"""

from pathlib import Path

from unlocked.runtime.metrics.records import EpochResult, Metric, RunInfo, StepResult
from unlocked.runtime.metrics.sinks import MetricsSink

__all__ = ["TensorBoard", "require_tensorboard"]


def require_tensorboard() -> None:
    """Raises: ValueError: the package is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs the package tensorboard; pip install 'unlocked[tensorboard]'") from error


class TensorBoard(MetricsSink):
    """Writes the event file of one run.

    Args:
        path: the run's folder; made if it does not exist. A second run in it is drawn over the first.

    Raises:
        ValueError: the package is not installed, or the folder can't be made.
    """

    def __init__(self, path: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(path))
        except OSError as error:
            raise ValueError(f"--tensorboard {path} can't be written ({error}); give a folder of yours") from error

    def on_start(self, info: RunInfo) -> None:
        stages = " | ".join(", ".join(layers) for layers in info.stages)
        text = f"{info.model} on {info.dataset}, {info.rule}, engine {info.engine} on {info.device}: {stages}"
        self._writer.add_text("run", text)

    def on_step(self, step: StepResult) -> None:
        done = step.epoch * step.steps + step.step + 1
        recent = step.recent
        for name, value in (
            ("loss", recent.loss),
            ("accuracy", recent.acc1),
            ("seconds", recent.time),
            ("waiting", recent.data),
        ):
            if value is not None:  # a task without classes has no accuracy
                self._writer.add_scalar(f"steps/{name}", value, done)

    def on_epoch(self, result: EpochResult) -> None:
        values = {
            "loss/train": result.train_loss,
            "loss/test": result.eval_loss,
            "accuracy/train": result.train_acc1,
            "accuracy/test": result.eval_acc1,
            "time/epoch": result.seconds,
            **{f"local_loss/{layer}": loss for layer, loss in result.local_losses},
            **{f"layer_accuracy/{layer}": value for layer, value in result.layer_acc1},
            **{f"{name}/train": value for name, value in result.train_figures},
            **{f"{name}/test": value for name, value in result.eval_figures},
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, result.epoch + 1)
        self._writer.flush()

    def on_metric(self, metric: Metric) -> None:
        self._writer.add_scalar(metric.name, metric.value, metric.epoch + 1)

    def on_message(self, text: str) -> None:
        self._writer.add_text("messages", text)

    def close(self) -> None:
        """Writes what is left; also after a failure."""
        self._writer.close()
