"""What a comparison found, as plain data: made by the measurement, read by the table, the page and whoever comes later.

Seconds are wall-clock seconds, memory is in bytes, accuracies are in percent, losses are mean cross-entropies.
`Report.to_json` and `Report.from_json` are inverse to each other.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from unlocked.comparison.logged import LoggedRun
from unlocked.runtime.saving.whole_file import json_text
from unlocked.runtime.typed import from_plain, to_plain

__all__ = [
    "FORMAT",
    "ComparisonSettings",
    "Contender",
    "Environment",
    "EpochFigures",
    "Report",
    "Run",
    "RunKind",
    "SpanKind",
    "Spread",
    "StepSplit",
    "TimelineExcerpt",
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
    """What something was measured on."""

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

    @property
    def line(self) -> str:
        """The machine and what matters most of its software, for a terminal."""
        machine = ", ".join([self.cpu, f"{self.cores} cores", *self.gpus])
        return f"{machine}, torch {self.versions.get('torch', '?')}, Python {self.python}"


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
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
class EpochFigures:
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
    layer_acc1: tuple[tuple[str, float], ...] = ()
    """Percent by layer, in network order: its own prediction's test accuracy, where it makes one."""


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
    epochs: tuple[EpochFigures, ...] = ()
    """Of an accuracy run."""
    base_memory_bytes: tuple[int, ...] = ()
    """One per process: held before anything was built, that is, libraries and data; empty where it is not told."""
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
    """sequential, processes, streams; of backpropagation also GPipe, 1F1B, zero-bubble, ZBV, PipeDream,
    PipeDream-2BW."""
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
    def own_memory_bytes(self) -> tuple[int, ...]:
        """Per process, the most over the runs of the peak less libraries and data: weights, optimizer, activations,
        slots, and whatever code is loaded on the way. Empty where it is not told."""
        runs = [zip(run.peak_memory_bytes, run.base_memory_bytes, strict=False) for run in self.runs]
        columns = zip(*([max(0, peak - base) for peak, base in pairs] for pairs in runs), strict=True)
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
    """What one process did from `start` to `end`: seconds of a clock that all processes of the contender share, in an
    excerpt since its begin."""

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
class TimelineExcerpt:
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
class Report:
    """A whole comparison."""

    environment: Environment
    settings: ComparisonSettings
    contenders: tuple[Contender, ...]
    """In the order of the table."""
    timelines: tuple[TimelineExcerpt, ...] = ()
    """Of LLS by processes and of backpropagation by 1F1B, where both were measured."""
    logged: LoggedRun | None = None
    """Shown for reference; other hardware, so no figure of this report may be compared with its seconds."""
    format: int = field(default=FORMAT)

    @property
    def measured(self) -> tuple[Contender, ...]:
        """The contenders with figures."""
        return tuple(contender for contender in self.contenders if contender.status == "measured")

    def to_json(self) -> str:
        return json_text(to_plain(self), indent=1)

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
        return from_plain(Report, content, "report")

    @staticmethod
    def load(path: Path) -> "Report":
        """Raises: ValueError as `from_json`, which names the file."""
        try:
            return Report.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
