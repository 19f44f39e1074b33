"""What a run leaves: figures per epoch, the final weights, and their digest."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unlocked.runtime.metrics.html import card, curves
from unlocked.runtime.metrics.records import EpochResult, Recovery
from unlocked.runtime.saving.model_file import save_model
from unlocked.runtime.schedules.placement import Link

__all__ = ["RunResult"]

_DIGITS = 12  # of the digest, where it is shown


@dataclass(slots=True, kw_only=True, repr=False)
class RunResult:
    """The outcome of `Trainer.fit`. Under `torchrun` only rank 0 holds figures and weights of all stages."""

    engine: str
    stages: list[list[str]]
    """The layer names of each stage."""
    epochs: list[EpochResult] = field(default_factory=list)
    """Those that ended here; after a resume they begin with the epoch in which it went on."""
    epochs_done: int = 0
    """Over the whole run, including the part before a resume."""
    steps: int = 0
    """Training micro-batches done, over the whole run including the part before a resume."""
    first_step: int = 0
    """Training micro-batches that were done before a resume: the others were trained here, in `train_seconds`."""
    train_seconds: float = 0.0
    setup_seconds: float = 0.0
    images_per_second: float = 0.0
    """Training images over `train_seconds`, in which evaluation counts as well."""
    predicted_images_per_second: float = 0.0
    """What the time of each layer, and of each link, promised before the run began (`processes`); 0: nothing did."""
    links: list[Link | None] = field(default_factory=list)
    """Between each two neighbouring stages on several machines, as they were measured (`processes`)."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Every parameter and buffer by layer and name, on the CPU."""
    weights_sha256: str = ""
    peak_memory_bytes: list[int] = field(default_factory=list)
    busy_fraction: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """Intra-op threads of each stage's process. On a CPU, equal bits need equal numbers of them."""
    stopped_by: int | None = None
    """The signal number of an orderly stop, or None."""
    stop_reason: str = ""
    """Why a metrics sink has stopped the run (`MetricsSink.stop`); empty: none has."""
    predicted_stage_seconds: list[float] = field(default_factory=list)
    """Of a training micro-batch, from timing each layer alone before the stages were cut; empty for one stage."""
    measured_stage_seconds: list[float] = field(default_factory=list)
    """Of a training micro-batch, on average: forward and update, without waiting for neighbours; empty where only the
    device knows (`streams`)."""
    plain_weights: dict[str, Tensor] = field(default_factory=dict)
    """The network's own, without the rules', by the names that it has as one plain module (`Trainer.module`)."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What `save` writes beside the weights, as JSON values."""

    recoveries: list[Recovery] = field(default_factory=list)
    """Workers that died and were replaced (`processes`)."""

    @property
    def is_complete(self) -> bool:
        """This process knows the whole run (under torchrun: rank 0)."""
        return bool(self.weights_sha256)

    def figures(self) -> dict[str, Any]:
        """The run in a few numbers, for logs."""
        return {
            "epochs": self.epochs_done,
            "steps": self.steps,
            "first_step": self.first_step,
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second,
            "predicted_images_per_second": self.predicted_images_per_second,
            "test_acc1": self.test_acc1,
            "test_loss": self.test_loss,
            **{f"test_{name}": value for name, value in self.test_figures.items()},
            "weights_sha256": self.weights_sha256,
            "threads": self.threads,
            "predicted_stage_seconds": self.predicted_stage_seconds,
            "measured_stage_seconds": self.measured_stage_seconds,
            "stopped_by": self.stopped_by,
            "stop_reason": self.stop_reason,
            "recoveries": [asdict(recovery) for recovery in self.recoveries],
        }

    @property
    def test_acc1(self) -> float | None:
        """Percent, after the last evaluated epoch."""
        return next((e.eval_acc1 for e in reversed(self.epochs) if e.eval_acc1 is not None), None)

    @property
    def test_loss(self) -> float | None:
        return next((e.eval_loss for e in reversed(self.epochs) if e.eval_loss is not None), None)

    @property
    def test_figures(self) -> dict[str, float]:
        """What the task tells besides loss and accuracy, after the last evaluated epoch."""
        return next((dict(e.eval_figures) for e in reversed(self.epochs) if e.eval_loss is not None), {})

    @property
    def layer_acc1(self) -> dict[str, float]:
        """Percent, of every layer that makes a prediction of its own, after the last evaluated epoch."""
        return next((dict(e.layer_acc1) for e in reversed(self.epochs) if e.layer_acc1), {})

    @property
    def local_losses(self) -> dict[str, float]:
        """Mean local loss per layer in the last epoch."""
        return dict(self.epochs[-1].local_losses) if self.epochs else {}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights as a plain network takes them: `fresh.load_state_dict(result.state_dict())`.

        By the names of `Trainer.module`: for what `unlocked.models.split` has cut, those of the module that was cut;
        for an nn.Sequential its own; for a list of layers those of nn.Sequential(*layers).

        Raises:
            ValueError: this process does not know all weights (under torchrun: it is not rank 0).
        """
        if not self.is_complete:
            raise ValueError("this process holds the weights of its own stage; under torchrun rank 0 has them all")
        return dict(self.plain_weights)

    def save(self, path: str | Path) -> None:
        """Writes the trained network's weights to one safetensors file; `unlocked.load` reads it.

        What is stored: `state_dict()`, and as JSON what the network is (a network of `unlocked.models` by its name and
        sizes; nothing of any other one's code), what it reads (shape, type, the images' mean and deviation), its
        classes, and the run's figures. Nothing in the file is executed when it is read.

        Raises:
            ValueError: as `state_dict`; or a weight that such a file can't hold.
        """
        save_model(Path(path), self.state_dict(), {**self.about, "figures": self.figures()})

    def __repr__(self) -> str:
        return f"RunResult({', '.join(text for _, text in self._lines())})"

    def _repr_html_(self) -> str:
        """How a notebook shows it: the figures, and a curve of every epoch."""
        accuracy: Mapping[str, Sequence[float | None]]
        accuracy = {"training": [e.train_acc1 for e in self.epochs], "test": [e.eval_acc1 for e in self.epochs]}
        loss: Mapping[str, Sequence[float | None]]
        loss = {"training": [e.train_loss for e in self.epochs], "test": [e.eval_loss for e in self.epochs]}
        first = self.epochs[0].epoch + 1 if self.epochs else 1
        pictures = [curves("accuracy, %", accuracy, first), curves("loss", loss, first)] if self.epochs else []
        return card("Training run", self._lines(), pictures)

    def _lines(self) -> list[tuple[str, str]]:
        stages = f"{len(self.stages)} stages" if len(self.stages) > 1 else "1 stage"
        lines = [("engine", f"{self.engine}, {stages}"), ("length", f"{self.epochs_done} epochs, {self.steps} steps")]
        if self.test_loss is not None:
            lines.append(_told("test", self.test_acc1, self.test_loss, self.test_figures))
        elif self.epochs:
            last = self.epochs[-1]
            lines.append(_told("training", last.train_acc1, last.train_loss, dict(last.train_figures)))
        lines.append(("speed", f"{self.images_per_second:,.0f} images/s, {self.train_seconds:.2f} s"))
        if self.stopped_by is not None:
            lines.append(("end", f"stopped by signal {self.stopped_by}"))
        digest = f"weights_sha256 {self.weights_sha256[:_DIGITS]}" if self.is_complete else "one stage's weights"
        return [*lines, ("weights", digest)]


def _told(word: str, accuracy: float | None, loss: float, figures: Mapping[str, float]) -> tuple[str, str]:
    others = "".join(f", {name} {value:.4g}" for name, value in figures.items())
    if accuracy is None:
        return "figures", f"{word} loss {loss:.4f}{others}"
    return "accuracy", f"{word} accuracy {accuracy:.2f} %, loss {loss:.4f}{others}"
