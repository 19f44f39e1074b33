"""What a comparison found, as plain data: made by the measurement, read by the table, the page and whoever comes later.

Seconds are wall-clock seconds, memory is in bytes, accuracies are in percent, losses are mean cross-entropies.
`Report.to_json` and `Report.from_json` are inverse to each other.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = [
    "FORMAT",
    "Contender",
    "Environment",
    "Epoch",
    "LoggedRun",
    "LoggedTraining",
    "Report",
    "Run",
    "RunKind",
    "Settings",
    "SpanKind",
    "Spread",
    "StepSplit",
    "Timeline",
    "TimelineSpan",
    "Trial",
]

FORMAT = 1
"""Of the JSON files; goes up when a reader of older ones would go wrong."""

Status = Literal["measured", "failed", "not run"]
RunKind = Literal["speed", "accuracy"]
SpanKind = Literal["data", "forward", "backward", "weight gradient", "local update", "update", "receive", "send"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the comparison ran on."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int | None
    gpus: tuple[str, ...]
    """Names of the CUDA devices; empty without any."""
    platform: str
    python: str
    versions: dict[str, str]
    """Package -> version: unlocked, torch, numpy, ..."""
    commit: str | None
    """Of the checkout, short, with a `+` if files differ from it; None outside of a checkout."""
    started_at: str
    """ISO 8601, UTC."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all contenders have in common, and what was asked for."""

    command: str
    """The command line, as it was given."""
    dataset: str
    model: str
    layers: tuple[str, ...]
    """Layer names in network order."""
    train_images: int
    test_images: int
    image_shape: tuple[int, ...]
    """(C, H, W) of one image."""
    device: str
    """cpu or cuda. Memory is the resident set of a process on a CPU, and what torch allocated on a GPU."""
    batch_size: int
    """Rows of a training micro-batch: one step of the optimizer, in every contender."""
    test_batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    label_smoothing: float
    waveform: str
    epochs: int
    """Of an accuracy run."""
    speed_steps: int
    """Training micro-batches of a speed run."""
    repeats: int
    """Speed runs of every contender, interleaved."""
    seeds: tuple[int, ...]
    """Of the accuracy runs, one run each; empty: none."""
    processes: int
    """Of every contender that is a pipeline."""
    precision: str = "fp32"
    """fp32, tf32 or bf16."""


@dataclass(frozen=True, kw_only=True)
class StepSplit:
    """Where one process's time goes, in seconds per training micro-batch; the four parts add up to its whole time."""

    data: float
    """Making the micro-batch out of the resident dataset: gather, augment, normalise."""
    compute: float
    """Forward, losses, backward, and whatever else the host does: all that is none of the others."""
    wait: float
    """For a neighbour's message or a free slot, and copying to and from slots."""
    update: float
    """The optimizer's step."""

    @property
    def total(self) -> float:
        return self.data + self.compute + self.wait + self.update


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """After one epoch of an accuracy run."""

    epoch: int
    """From 0."""
    seconds: float
    """Since training began, the evaluations so far included, set-up not."""
    train_loss: float
    """Of the output layer, mean over the epoch's training samples."""
    test_loss: float | None
    test_acc1: float | None
    """Percent."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training in processes of its own.

    A speed run trains without evaluation; an accuracy run evaluates after every epoch, and its seconds hold that.
    """

    kind: RunKind
    seed: int
    steps: int
    """Training micro-batches."""
    train_seconds: float
    """Without set-up."""
    setup_seconds: float
    """Building, compiling, partitioning, linking; without loading Python, torch and the dataset."""
    images_per_second: float
    """Training images over `train_seconds`."""
    split: tuple[StepSplit, ...]
    """One per process, in stage order; empty where it can't be told (a GPU's captured graph)."""
    peak_memory_bytes: tuple[int, ...]
    """One per process, in stage order."""
    bubble_share: float | None
    """Share of the processes' time without work, 0 to 1, mean over the processes; None where it can't be told."""
    energy_joules: float | None
    """Of the GPU (NVML) or the CPU package (RAPL) while training, whole device; None where nothing reports it."""
    epochs: tuple[Epoch, ...] = ()
    """Of an accuracy run."""
    weights_sha256: str | None = None
    """Digest of the final weights: equal for all engines of one rule, seed and number of threads."""

    @property
    def test_acc1(self) -> float | None:
        """Percent, after the last epoch."""
        return self.epochs[-1].test_acc1 if self.epochs else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One form of a contender that was tried before the measurement, so that its best form counts."""

    chunks: int
    """Into which a micro-batch is cut."""
    stages: tuple[tuple[str, ...], ...]
    """Layer names of each stage."""
    images_per_second: float | None
    reason: str | None = None
    """Why it failed, if it did."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over runs."""

    median: float
    low: float
    high: float
    mean: float
    deviation: float
    """Sample standard deviation; 0 for a single value."""
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread | None":
        """None without values."""
        if not values:
            return None
        return Spread(
            median=statistics.median(values),
            low=min(values),
            high=max(values),
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else 0.0,
            count=len(values),
        )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train, and its runs."""

    name: str
    """Unique, such as "LLS, 2 processes"."""
    family: str
    """What it minimises: BP, LLS, LLS_M or LLS_MxM."""
    engine: str
    """sequential, processes, streams; of backpropagation also GPipe, 1F1B, interleaved zero-bubble, ZBV."""
    processes: int
    threads: int
    """Of each process."""
    status: Status
    reason: str | None = None
    """Why it failed or was not run, in one line."""
    stages: tuple[tuple[str, ...], ...] = ()
    """Layer names of each stage of a pipeline, as it was measured."""
    chunks: int | None = None
    """Into which a pipeline of backpropagation cuts a micro-batch."""
    note: str = ""
    """What a reader must know of it, in one line."""
    runs: tuple[Run, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def is_pipeline(self) -> bool:
        """Several processes that hold a part of the network each."""
        return self.processes > 1

    @property
    def speed_runs(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.kind == "speed")

    @property
    def accuracy_runs(self) -> tuple[Run, ...]:
        """One per seed."""
        return tuple(run for run in self.runs if run.kind == "accuracy")

    @property
    def images_per_second(self) -> Spread | None:
        """Of the speed runs, or of the accuracy runs (evaluation included) if there are no others."""
        return Spread.of([run.images_per_second for run in self.speed_runs or self.accuracy_runs])

    @property
    def train_seconds(self) -> Spread | None:
        """Of the accuracy runs: time to train for all epochs, evaluations included."""
        return Spread.of([run.train_seconds for run in self.accuracy_runs])

    @property
    def test_acc1(self) -> Spread | None:
        """Percent, over the seeds."""
        return Spread.of([run.test_acc1 for run in self.accuracy_runs if run.test_acc1 is not None])

    @property
    def split(self) -> tuple[StepSplit, ...]:
        """Per process, of the speed run whose images/s is the median one; empty where it can't be told."""
        runs = sorted((run for run in self.speed_runs or self.accuracy_runs), key=lambda run: run.images_per_second)
        return runs[(len(runs) - 1) // 2].split if runs else ()

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Per process, the most over the runs."""
        columns = zip(*(run.peak_memory_bytes for run in self.runs), strict=True)
        return tuple(max(column) for column in columns)

    @property
    def bubble_share(self) -> Spread | None:
        runs = self.speed_runs or self.accuracy_runs
        return Spread.of([run.bubble_share for run in runs if run.bubble_share is not None])

    @property
    def joules_per_image(self) -> Spread | None:
        runs = [run for run in self.speed_runs or self.accuracy_runs if run.energy_joules is not None]
        images = [run.images_per_second * run.train_seconds for run in runs]
        return Spread.of([(run.energy_joules or 0.0) / n for run, n in zip(runs, images, strict=True) if n])


@dataclass(frozen=True, kw_only=True)
class TimelineSpan:
    """What one process did from `start` to `end`, seconds since the timeline's begin."""

    row: int
    """The process, from 0."""
    kind: SpanKind
    microbatch: int
    """The training micro-batch (step) it belongs to, counted over the run from 0."""
    chunk: int | None
    """Of the micro-batch, from 0; None where micro-batches are not cut."""
    stage: int
    """The stage it belongs to; a process may hold several."""
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """A window of one measured run, past the warm-up, all processes on one clock.

    Gaps between spans are bubbles and communication. All timelines of a report show windows of the same length.
    """

    contender: str
    """`Contender.name`."""
    rows: tuple[str, ...]
    """What each row is called: its process and its layers."""
    seconds: float
    """Length of the window."""
    spans: tuple[TimelineSpan, ...]
    """In order of their start."""


@dataclass(frozen=True, kw_only=True)
class LoggedTraining:
    """One rule's part of the logged run."""

    total_minutes: float
    seconds_per_step: float
    data_seconds_per_step: float
    """Of which waiting for data."""
    test_acc1: float
    test_acc5: float
    """Percent."""


@dataclass(frozen=True, kw_only=True)
class LoggedRun:
    """The training log that the project is measured against."""

    note: str
    command: str
    model: str
    dataset: str
    epochs: int
    batch_size: int
    steps_per_epoch: int
    trainings: dict[str, LoggedTraining]
    """By family: BP and LLS."""

    @staticmethod
    def load() -> "LoggedRun":
        """The one that lies beside this file."""
        text = Path(__file__).with_name("logged_run.json").read_text(encoding="utf-8")
        logged = _revive(LoggedRun, json.loads(text), "logged run")
        assert isinstance(logged, LoggedRun)
        return logged


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole comparison."""

    environment: Environment
    settings: Settings
    contenders: tuple[Contender, ...]
    """In the order of the table."""
    timelines: tuple[Timeline, ...] = ()
    """Of LLS by processes and of backpropagation by 1F1B, where both were measured."""
    logged: LoggedRun | None = None
    """Shown for reference; other hardware, so no figure of this report may be compared with its seconds."""
    format: int = field(default=FORMAT)

    @property
    def measured(self) -> tuple[Contender, ...]:
        """The contenders with figures."""
        return tuple(contender for contender in self.contenders if contender.status == "measured")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Report":
        """The inverse of `to_json`.

        Raises:
            ValueError: no report of this format; says where it differs.
        """
        content = json.loads(text)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise ValueError(f"a report has the format {FORMAT}, got {found!r}; make it anew with this version")
        report = _revive(Report, content, "report")
        assert isinstance(report, Report)
        return report

    @staticmethod
    def load(path: Path) -> "Report":
        """Raises: ValueError as `from_json`."""
        return Report.from_json(path.read_text(encoding="utf-8"))


def _revive(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gives it back, as the type that a field's annotation names."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _revive_dataclass(kind, value, where)
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        return _revive(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_revive(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _revive(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}, where {kind} belongs")


def _revive_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, where a {kind.__name__} belongs")
    hints = get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    missing, unknown = required - value.keys(), value.keys() - hints.keys()
    if missing or unknown:
        raise ValueError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    return kind(**{name: _revive(hints[name], content, f"{where}.{name}") for name, content in value.items()})
