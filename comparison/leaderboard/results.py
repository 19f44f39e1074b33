"""What the leaderboard keeps of a cell, as plain data, and what it makes of many: rows, one per rule and network.

Seconds are wall-clock seconds, memory and traffic are in bytes, accuracies in percent.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Inspection", "Measures", "Row", "Timing", "Training", "best_first"]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a few steps on the cell's own data and network tell without a clock."""

    layers: tuple[str, ...]
    parameters: int
    activation_bytes: int | None
    """The most at once in a step of one process, without what persists; None: see `notes`."""
    edge_bytes: tuple[float, ...]
    """Per image, of a micro-batch's message after each layer but the last: activations, labels, side channel."""
    cuts: int
    """Between two layers, at which all later layers began with other weights."""
    steps: int
    """Training micro-batches after which the earlier layers were compared, bit for bit."""
    leaks: tuple[str, ...] | None
    """Layers that came out otherwise although only later ones had begun so; None: see `notes`."""
    notes: tuple[str, ...] = ()
    """Why something could not be found out."""

    @property
    def is_local(self) -> bool | None:
        return None if self.leaks is None else not self.leaks


@dataclass(frozen=True, kw_only=True)
class Training:
    """One cell: a run with evaluation, in one process of one thread."""

    test_acc1: float
    """After the last epoch."""
    epochs: tuple[float, ...]
    """Test accuracy after each."""
    steps: int
    train_seconds: float
    """Evaluation included, set-up not."""
    weights_sha256: str
    layer_acc1: tuple[tuple[str, float], ...] = ()
    """Of the layers' own predictions, after the last epoch, in network order."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How a row's speed was measured."""

    seed: int
    speed_steps: int
    """Training micro-batches of a timed run."""
    repeats: int
    processes: int
    """Asked for, of the pipeline."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured once for a rule, a network and a dataset, while nothing else runs."""

    images_per_second: float | None
    """Training in one process of one thread, without evaluation: median of the repeats. None: not timed."""
    pipeline_images_per_second: float | None
    """In a pipeline; None: the rule has none, or it failed (`notes`)."""
    processes: int
    """Of the pipeline."""
    is_exact: bool | None
    """The pipeline left the bits of the one process; None: there is no pipeline."""
    pipeline_edge_bytes: float | None
    """Per image, over all edges of that pipeline."""
    joules_per_image: float | None
    """Of the CPU packages or the GPU, in one process; None where nothing reports it."""
    inspection: Inspection | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rule on a network and a dataset: its seeds, its measures, and whether it differs from backpropagation."""

    rule: str
    network: str
    dataset: str
    trainings: tuple[Training, ...]
    failures: tuple[str, ...]
    """One per seed that failed."""
    measures: Measures | None
    timing: Timing | None = None
    """Of the measures; None: there are none, or nobody knows."""
    measures_failed: str | None = None
    p: float = math.nan
    """Of an accuracy equal to backpropagation's: Welch's test, corrected by Holm over the rules of the table."""

    @property
    def accuracies(self) -> list[float]:
        return [training.test_acc1 for training in self.trainings]

    @property
    def seeds_told(self) -> str:
        """How many the mean is of, and of how many that were trained."""
        all_of = len(self.trainings) + len(self.failures)
        return f"{len(self.trainings)} of {all_of}" if self.failures else f"{all_of}"

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.accuracies) if self.trainings else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.accuracies) if len(self.trainings) > 1 else None

    @property
    def layer_accuracies(self) -> dict[str, float]:
        """Mean over the seeds, by layer; empty where only the output layer predicts."""
        told = [dict(training.layer_acc1) for training in self.trainings if len(training.layer_acc1) > 1]
        return {name: statistics.fmean(one[name] for one in told if name in one) for name in told[0]} if told else {}

    @property
    def train_seconds(self) -> float | None:
        """Median over the seeds."""
        return statistics.median(t.train_seconds for t in self.trainings) if self.trainings else None


def best_first(rows: Sequence[Row]) -> list[Row]:
    """By accuracy; what has none comes last."""
    return sorted(rows, key=lambda row: -math.inf if row.mean is None else row.mean, reverse=True)
