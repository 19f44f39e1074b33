"""What a run tells about itself: plain records, and their aggregation over stages.

The same records come from the in-process engines (directly) and from the coordinator (over the wire). Losing any of
them never changes a result.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "EpochAggregator",
    "EpochPart",
    "EpochResult",
    "Meters",
    "Metric",
    "Rates",
    "Recovery",
    "RunInfo",
    "Scores",
    "StageProgress",
    "StepResult",
    "rates_between",
]

NamedLosses = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInfo:
    """What is about to run; constant over the run."""

    model: str
    dataset: str
    engine: str
    rule: str
    stages: tuple[tuple[str, ...], ...]
    """Layer names of each stage, in order."""
    total: int
    """Number of positions in the stream of micro-batches."""
    epochs: int
    steps_per_epoch: int
    batch_size: int
    start: int = 0
    """First position this run executes (above 0 after a resume)."""
    device: str = "cpu"
    scored: tuple[str, ...] = ()
    """The layers whose own prediction is counted in evaluation."""
    task: str = "classification"
    best: tuple[str, bool] = ("acc1", True)
    """The figure of an evaluation by which epochs are ranked, and whether more of it is better."""
    figures: tuple[str, ...] = ()
    """What the task tells besides loss and accuracy."""
    evaluates: bool = True
    """There is an evaluation after every epoch."""

    @property
    def task_told(self) -> str:
        """For a title: classification goes without saying."""
        return "" if self.task == "classification" else f", task {self.task}"

    @property
    def layers(self) -> tuple[str, ...]:
        """All layer names in network order."""
        return tuple(layer for stage in self.stages for layer in stage)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProgress:
    """How far one stage is. All counters are totals since the stage started, so a lost record costs nothing."""

    stage: int
    position: int
    """Stream positions completed: the next position to run."""
    epoch: int
    """Epoch of the micro-batch in hand, from 0."""
    images: int
    """Training images processed."""
    busy_seconds: float
    wait_seconds: float
    seconds: float
    """Wall-clock seconds of this stage's run so far."""
    queue_fill: float = 0.0
    """Share of the stage's incoming edge that is filled, 0 to 1."""
    local_losses: NamedLosses = ()
    """Latest (layer, local loss) pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Mean loss and accuracy in percent over a set of samples, and the other figures of the run's task."""

    loss: float
    acc1: float | None
    acc5: float | None
    figures: NamedLosses = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Meters:
    """One reading of the training meters: seconds per step, of which waiting for data, and the scores."""

    time: float
    data: float
    loss: float
    acc1: float | None
    acc5: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The last stage's training meters, sent every `print_freq` steps."""

    epoch: int
    step: int
    """Step within the epoch, from 0."""
    steps: int
    """Steps per epoch."""
    recent: Meters
    """Mean over the steps since the previous StepResult."""
    mean: Meters
    """Mean over the epoch so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPart:
    """One stage's contribution to an epoch's result; `train` and `evaluation` come from the last stage only."""

    stage: int
    epoch: int
    local_losses: NamedLosses
    """Mean local loss of each of the stage's layers over the epoch's training micro-batches."""
    seconds: float
    """Wall-clock seconds this stage spent from the epoch's first position to its last."""
    train: Scores | None = None
    evaluation: Scores | None = None
    layer_acc1: NamedLosses = ()
    """Evaluation accuracy in percent of each of the stage's layers that make a prediction of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochResult:
    """A whole epoch, all stages together."""

    epoch: int
    train_loss: float
    train_acc1: float | None
    """Percent; None: the run's task has no accuracy of this kind."""
    train_acc5: float | None
    eval_loss: float | None
    eval_acc1: float | None
    eval_acc5: float | None
    local_losses: NamedLosses
    """(layer, mean local loss) in network order."""
    seconds: float
    """Wall-clock seconds of the epoch at the last stage."""
    layer_acc1: NamedLosses = ()
    """(layer, evaluation accuracy in percent of its own prediction) of those that make one, in network order."""
    train_figures: NamedLosses = ()
    """What else the run's task tells, by name."""
    eval_figures: NamedLosses = ()

    def figure(self, name: str) -> float | None:
        """Of the evaluation: "loss", "acc1", "acc5" or one of the task's own; None: there is none."""
        if name in ("loss", "acc1", "acc5"):
            value: float | None = getattr(self, f"eval_{name}")
            return value
        return dict(self.eval_figures).get(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """One worker that died and was replaced, while the others went on."""

    stage: int
    incarnation: int
    """The number of the worker that took over; the first one of a stage is 0."""
    cause: str
    """How the one before it ended."""
    position: int
    """Where the new one began: the stream position of the stage's last snapshot of itself."""
    replayed: int
    """Items that it did again before it came to where the other was."""
    seconds: float
    """From the news of the death to the first item that had not been done."""
    ended: float
    """When that was, in seconds of the machine's clock."""

    def told(self, name: str) -> str:
        """One line for the user; `name` is the stage's."""
        return (
            f"recovered {name}: its worker {self.cause}; the next one began at position {self.position}, did "
            f"{self.replayed} items again, and went on after {self.seconds:.2f} s"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure of a sink's own (`MetricsSink.tell`)."""

    name: str
    value: float
    epoch: int
    """That it belongs to, from 0."""


class EpochAggregator:
    """Joins the stages' `EpochPart`s into `EpochResult`s, released in epoch order.

    Args:
        stages: number of stages.
        first_epoch: the first epoch this run reports (above 0 after a resume).
    """

    def __init__(self, stages: int, first_epoch: int | None = None) -> None:
        if stages < 1:
            raise ValueError(f"stages is {stages}; an aggregator needs at least 1")
        self._stages = stages
        self._next = first_epoch
        self._parts: dict[int, dict[int, EpochPart]] = {}

    def is_new(self, part: EpochPart) -> bool:
        """Whether it has not come before: a worker that does a dead one's work again reports again."""
        is_over = self._next is not None and part.epoch < self._next
        return not is_over and part.stage not in self._parts.get(part.epoch, ())

    def add(self, part: EpochPart) -> list[EpochResult]:
        """Takes one part; returns the epochs that are now complete (usually none or one). A part that comes again
        counts once.

        Raises:
            ValueError: the part's stage does not exist, or the last stage's part has no training scores.
        """
        if not 0 <= part.stage < self._stages:
            raise ValueError(f"epoch part from stage {part.stage}; valid: 0 to {self._stages - 1}")
        if part.stage == self._stages - 1 and part.train is None:
            raise ValueError(f"epoch {part.epoch}: the last stage ({part.stage}) must report its training scores")
        if self._next is None:
            self._next = part.epoch  # every stage passes the epochs in order, so the first part is the first epoch
        if self.is_new(part):
            self._parts.setdefault(part.epoch, {})[part.stage] = part
        done = []
        while len(self._parts.get(self._next, ())) == self._stages:
            done.append(_join(self._parts.pop(self._next)))
            self._next += 1
        return done


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Speeds of one stage between two of its progress records."""

    images_per_second: float
    positions_per_second: float
    busy: float
    """Share of the time spent working, 0 to 1."""


def rates_between(earlier: StageProgress, later: StageProgress) -> Rates | None:
    """The speeds between two records of the same stage; None when no time lies between them."""
    seconds = later.seconds - earlier.seconds
    if seconds <= 0:
        return None
    return Rates(
        images_per_second=(later.images - earlier.images) / seconds,
        positions_per_second=(later.position - earlier.position) / seconds,
        busy=min(1.0, max(0.0, (later.busy_seconds - earlier.busy_seconds) / seconds)),
    )


def _join(parts: Mapping[int, EpochPart]) -> EpochResult:
    last = parts[max(parts)]
    assert last.train is not None
    evaluation = last.evaluation
    return EpochResult(
        epoch=last.epoch,
        train_loss=last.train.loss,
        train_acc1=last.train.acc1,
        train_acc5=last.train.acc5,
        eval_loss=evaluation.loss if evaluation else None,
        eval_acc1=evaluation.acc1 if evaluation else None,
        eval_acc5=evaluation.acc5 if evaluation else None,
        local_losses=tuple(pair for stage in sorted(parts) for pair in parts[stage].local_losses),
        seconds=last.seconds,
        layer_acc1=tuple(pair for stage in sorted(parts) for pair in parts[stage].layer_acc1),
        train_figures=last.train.figures,
        eval_figures=evaluation.figures if evaluation else (),
    )
