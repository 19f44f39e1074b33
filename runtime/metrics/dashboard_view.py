"""How the dashboard looks: what it shows, and the drawing of one frame for a terminal of a given size."""

import math
from dataclasses import dataclass, field, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from unlocked.runtime.metrics.records import EpochResult, Rates, RunInfo, StageProgress, StepResult

__all__ = ["StageView", "View", "bar", "render", "time_text"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_EPOCH_ROWS = 5


@dataclass(frozen=True, slots=True)
class StageView:
    """The latest of one stage."""

    progress: StageProgress
    rates: Rates | None


@dataclass(slots=True)
class View:
    """Everything a frame shows."""

    info: RunInfo
    began: float
    """Clock reading at the start of the run, seconds."""
    stages: list[StageView | None] = field(default_factory=list)
    step: StepResult | None = None
    epochs: list[EpochResult] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    """Each layer's mean local loss in the last complete epoch; shown until a stage reports newer ones."""

    accuracies: dict[str, float] = field(default_factory=dict)
    """Test accuracy in percent of each layer that makes a prediction of its own, after the last epoch."""

    complete: bool = False
    """The last epoch's result is in."""

    def __post_init__(self) -> None:
        if not self.stages:
            self.stages = [None] * len(self.info.stages)

    def copy(self) -> "View":
        return replace(
            self,
            stages=list(self.stages),
            epochs=list(self.epochs),
            losses=dict(self.losses),
            accuracies=dict(self.accuracies),
        )

    @property
    def position(self) -> int:
        """Positions that all stages have completed."""
        if self.complete:
            return self.info.total
        return min((stage.progress.position if stage else self.info.start) for stage in self.stages)

    @property
    def done(self) -> float:
        """Share of the stream that is done, 0 to 1."""
        return self.position / self.info.total if self.info.total else 1.0

    @property
    def images_per_second(self) -> float:
        """Speed of the slowest stage."""
        rates = [stage.rates.images_per_second for stage in self.stages if stage and stage.rates]
        return min(rates, default=0.0)

    def seconds_left(self, now: float) -> float:
        """At the mean speed of the run so far; infinite while nothing is done."""
        done = self.position - self.info.start
        return (self.info.total - self.position) * (now - self.began) / done if done > 0 else math.inf


def render(view: View, now: float, *, width: int, height: int) -> RenderableType:
    """A frame that fits `width` columns and `height` rows."""
    layers = len(view.info.layers)
    tall = layers + 7 <= height  # room for a row per layer, not only per stage
    stage_rows = layers if tall else len(view.stages)
    epochs = view.epochs[-min(_EPOCH_ROWS, max(1, height - stage_rows - 6)) :]
    around = 4 + (len(epochs) + 2 if epochs else 0)  # header, progress, the tables' heads, and blank rows
    parts: list[RenderableType] = [_header(view), _progress(view, now, width), Text("")]
    parts.append(_stage_table(view, rows=max(3, height - around), width=width, tall=tall))
    if epochs:
        parts += [Text(""), _epoch_table(epochs, view.info.epochs, wide=width >= 72)]
    return Group(*parts)


def bar(share: float, width: int) -> str:
    """`share` of `width` cells as a bar with eighths of a cell."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8) if share == share else 0
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def time_text(seconds: float) -> str:
    """`1:02:03`, `2:03`, or `--:--` for a time nobody knows."""
    if not math.isfinite(seconds):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _header(view: View) -> Text:
    info = view.info
    stages = f"{len(info.stages)} stages" if len(info.stages) > 1 else "1 stage"
    text = Text.assemble(
        (info.model, "bold"),
        " on ",
        (info.dataset, "bold"),
        f" · {info.rule} · {info.engine}, {stages} · {info.device}",
    )
    return _line(text)


def _progress(view: View, now: float, width: int) -> Text:
    last = view.stages[-1]
    # Progress may be lost on a busy machine; an epoch's result is not.
    heard = max(last.progress.epoch if last else 0, view.epochs[-1].epoch if view.epochs else 0)
    epoch = min(heard + 1, view.info.epochs)
    right = (
        f" {view.done:4.0%}  epoch {epoch}/{view.info.epochs}  {view.images_per_second:,.0f} images/s"
        f"  {time_text(view.seconds_left(now))} left"
    )
    cells = max(5, width - len(right))
    text = Text.assemble((bar(view.done, cells), "cyan on grey23"), right)
    return _line(text)


def _stage_table(view: View, rows: int, width: int, tall: bool) -> Table:
    wide = width >= 90
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True, header_style="dim")
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("layers", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("images/s", justify="right", no_wrap=True, min_width=8)
    table.add_column("busy", no_wrap=True, min_width=13 if wide else 10)
    table.add_column("queue", no_wrap=True, min_width=8 if wide else 5)
    table.add_column("local losses", no_wrap=True, overflow="ellipsis", ratio=3)
    scored = wide and len(view.accuracies) > 1
    if scored:
        table.add_column("test acc1", justify="right", no_wrap=True, overflow="ellipsis", ratio=2)
    chosen = list(range(len(view.stages))) if tall else _chosen(len(view.stages), rows)
    for index in chosen:
        if index is None:
            hidden = len(view.stages) - (rows - 1)
            table.add_row("⋮", Text(f"{hidden} more stages", style="dim"))
        else:
            row = _stage_row(view, index, wide, tall)
            table.add_row(*row, *([_accuracies(view, index, tall)] if scored else []))
    return table


def _chosen(count: int, rows: int) -> list[int | None]:
    """Which stages to show in `rows` rows: all, or the first and the last ones around one row of dots."""
    if count <= rows:
        return list(range(count))
    head = rows // 2
    tail = rows - head - 1
    return [*range(head), None, *range(count - tail, count)]


def _stage_row(view: View, index: int, wide: bool, tall: bool) -> list[RenderableType]:
    stage, layers = view.stages[index], view.info.stages[index]
    names = "\n".join(layers) if tall else ", ".join(layers)
    latest = dict(stage.progress.local_losses) if stage else {}
    losses = [latest.get(layer, view.losses.get(layer)) for layer in layers]
    loss_text = ("\n" if tall else " ").join("-" if loss is None else f"{loss:.3f}" for loss in losses)
    if stage is None:
        return [str(index), names, Text("waiting", style="dim"), "", "", loss_text]
    speed: RenderableType = f"{stage.rates.images_per_second:,.0f}" if stage.rates else Text("-", style="dim")
    busy: RenderableType = ""
    if stage.rates:
        share = stage.rates.busy
        style = "green" if share >= 0.7 else "yellow" if share >= 0.3 else "red"
        busy = Text.assemble((bar(share, 8 if wide else 5), f"{style} on grey23"), f" {share:4.0%}")
    queue = Text(bar(stage.progress.queue_fill, 8 if wide else 5), style="blue on grey23") if index else Text("")
    return [str(index), names, speed, busy, queue, loss_text]


def _accuracies(view: View, index: int, tall: bool) -> str:
    values = [view.accuracies.get(layer) for layer in view.info.stages[index]]
    return ("\n" if tall else " ").join(_number(value, 1) for value in values)


def _epoch_table(epochs: list[EpochResult], total: int, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    titles = [
        "epoch",
        "train loss",
        "train acc1",
        "test loss",
        "test acc1",
        *(["test acc5", "seconds"] if wide else []),
    ]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for result in epochs:
        cells = [
            f"{result.epoch + 1}/{total}",
            f"{result.train_loss:.4f}",
            _number(result.train_acc1, 2),
            _number(result.eval_loss, 4),
            _number(result.eval_acc1, 2),
            _number(result.eval_acc5, 2),
            f"{result.seconds:.2f}",
        ]
        table.add_row(*cells[: len(titles)])
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
