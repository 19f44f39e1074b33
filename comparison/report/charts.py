"""The comparison's charts, each from the report to a picture."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from unlocked.comparison.report.figures import FAMILY_COLOURS, Ink, Picture, draw
from unlocked.comparison.report.verdict import best
from unlocked.comparison.results import Contender, Report, Spread, StepSplit, TimelineExcerpt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accuracy_chart", "logged_chart", "split_chart", "throughput_chart", "timeline_chart"]

_DASHES: Final = ("-", "--", ":", "-.")
_PARTS: Final = {"compute": Ink.BLUE, "update": Ink.PURPLE, "data": Ink.TEAL, "wait": Ink.GREY}
_SPANS: Final = {
    "forward": Ink.BLUE,
    "local update": Ink.TEAL,
    "backward": Ink.ORANGE,
    "weight gradient": Ink.AMBER,
    "update": Ink.PURPLE,
    "data": Ink.PINK,
    "receive": Ink.GREY,
    "send": Ink.GREY,
}


def throughput_chart(report: Report) -> Picture | None:
    """Images per second: a bar to the median, a line from the slowest to the fastest run, a dot per run."""
    shown = [(c, c.images_per_second) for c in report.measured if c.images_per_second is not None]
    if not shown:
        return None
    count = len(shown)
    top = max(spread.high for _, spread in shown)

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _rows(axes, [c.name for c, _ in shown], narrow)
        for row, (contender, spread) in enumerate(shown):
            axes.barh(row, spread.median, height=0.5, color=_colour(contender))
            axes.plot([spread.low, spread.high], [row, row], color=Ink.TEXT, linewidth=1.2)
            rates = [run.images_per_second for run in contender.speed_runs or contender.accuracy_runs]
            axes.plot(rates, [row] * len(rates), "o", color=Ink.TEXT, markersize=3)
            axes.text(spread.high + 0.015 * top, row, f"{spread.median:,.0f}", va="center")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4 if narrow else 8)
        axes.set_xlim(0, top * (1.24 if narrow else 1.12))
        axes.set_xlabel("images per second (median, slowest to fastest)")

    return draw(
        "throughput",
        title="Throughput",
        description="; ".join(f"{c.name} {s.median:,.0f} images per second" for c, s in shown),
        plot=plot,
        wide_height=0.9 + 0.36 * count,
        narrow_height=1.0 + 0.62 * count,
    )


def logged_chart(report: Report) -> Picture | None:
    """Time per image, BP in one process being 1: here, and in the logged run."""
    base = best(report, lambda c: c.family == "BP" and not c.is_pipeline)
    if report.logged is None or not {"BP", "LLS"} <= report.logged.trainings.keys() or base is None:
        return None
    reference = base.images_per_second
    assert reference is not None
    logged = report.logged.trainings["LLS"].total_minutes / report.logged.trainings["BP"].total_minutes
    shown = [
        (c, reference.median / c.images_per_second.median) for c in report.measured if c.images_per_second is not None
    ]

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _rows(axes, [c.name for c, _ in shown], narrow)
        axes.set_ylim(len(shown) - 0.4, -1.6)
        marks = ((1.0, "BP = 1", -1, Ink.MUTED), (logged, f"logged LLS: {logged:.2f}", 1, Ink.PINK))
        for value, text, side, colour in marks:
            axes.axvline(value, color=colour, linestyle="--", linewidth=1.4)
            axes.annotate(
                text,
                (value, -1.05),
                xytext=(5 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=colour,
            )
        for row, (contender, ratio) in enumerate(shown):
            axes.plot([1, ratio], [row, row], color=_colour(contender), linewidth=3)
            axes.plot([ratio], [row], "o", color=_colour(contender), markersize=8)
        axes.set_xlim(0, max(*(ratio for _, ratio in shown), logged) * (1.25 if narrow else 1.1))
        axes.set_xlabel("time per training image, the fastest BP in one process = 1")

    minutes = {name: training.total_minutes for name, training in report.logged.trainings.items()}
    return draw(
        "logged",
        title="Beside the logged run",
        description=(
            f"in the logged run LLS took {minutes['LLS']:g} minutes where BP took {minutes['BP']:g}, a ratio of "
            f"{logged:.2f}; here: " + "; ".join(f"{c.name} {ratio:.2f}" for c, ratio in shown)
        ),
        plot=plot,
        wide_height=1.3 + 0.34 * len(shown),
        narrow_height=1.4 + 0.6 * len(shown),
    )


def split_chart(report: Report) -> Picture | None:
    """Milliseconds of each process per training micro-batch, in four parts."""
    rows: list[tuple[str, StepSplit]] = []
    for contender in report.measured:
        for number, split in enumerate(contender.split):
            process = f", process {number}" if len(contender.split) > 1 else ""
            rows.append((contender.name + process, split))
    if not rows:
        return None

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _rows(axes, [name for name, _ in rows], narrow)
        for part, colour in _PARTS.items():
            lefts = [_left_of(split, part) * 1e3 for _, split in rows]
            widths = [getattr(split, part) * 1e3 for _, split in rows]
            axes.barh(range(len(rows)), widths, left=lefts, height=0.5, color=colour, label=part)
        axes.set_xlabel("milliseconds per micro-batch")
        _legend_above(figure, axes, columns=2 if narrow else 4)

    return draw(
        "split",
        title="Where a step's time goes",
        description="; ".join(
            f"{name}: {', '.join(f'{part} {getattr(split, part) * 1e3:.2f} ms' for part in _PARTS)}"
            for name, split in rows
        ),
        plot=plot,
        wide_height=1.2 + 0.32 * len(rows),
        narrow_height=1.4 + 0.58 * len(rows),
    )


def accuracy_chart(report: Report) -> Picture | None:
    """Test accuracy over epochs and over time: mean over the seeds, a band of one standard deviation."""
    shown = _told_apart([c for c in report.measured if c.test_acc1 is not None])
    if not shown:
        return None
    dashes = {c.name: _DASHES[_rank(c, shown) % len(_DASHES)] for c in shown}

    def plot(figure: "Figure", narrow: bool) -> None:
        panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, sharey=True)
        for axes, by_time in zip(panels, (False, True), strict=True):
            for contender in shown:
                times, values = _curve(contender)
                x = times if by_time else [float(n) for n in range(1, len(values) + 1)]
                colour = _colour(contender)
                axes.plot(x, [v.mean for v in values], dashes[contender.name], color=colour, label=contender.name)
                axes.plot(x, [v.mean for v in values], "o", color=colour, markersize=3)
                if values[0].count > 1:
                    low, high = ([v.mean + sign * v.deviation for v in values] for sign in (-1, 1))
                    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.set_xlim(left=0)
            if not by_time:
                axes.locator_params(axis="x", integer=True)
            axes.set_xlabel("seconds, evaluation included" if by_time else "epochs")
            axes.set_title("over time" if by_time else "over epochs")
        for axes in panels if narrow else panels[:1]:
            axes.set_ylabel("test accuracy, %")
        _legend_above(figure, panels[0], columns=1 if narrow else 3)

    return draw(
        "accuracy",
        title="Accuracy",
        description="; ".join(
            f"{c.name} {s.mean:.1f} % after {len(c.accuracy_runs[0].epochs)} epochs"
            for c in shown
            if (s := c.test_acc1) is not None
        ),
        plot=plot,
        wide_height=3.6 + 0.22 * -(-len(shown) // 3),
        narrow_height=6.0 + 0.25 * len(shown),
    )


def _told_apart(trained: Sequence[Contender]) -> list[Contender]:
    """Of every rule its first contender, its fastest, and its fastest pipeline: more lines could not be told apart."""

    def seconds(contender: Contender) -> float:
        spread = contender.train_seconds
        return spread.median if spread is not None else float("inf")

    chosen = set()
    for family in {c.family for c in trained}:
        mine = [c for c in trained if c.family == family]
        piped = [c for c in mine if c.is_pipeline]
        chosen |= {mine[0].name, min(mine, key=seconds).name, *([min(piped, key=seconds).name] if piped else [])}
    return [c for c in trained if c.name in chosen]


def timeline_chart(report: Report) -> Picture | None:
    """The measured timelines one above the other, on one scale of time."""
    timelines = sorted(report.timelines, key=lambda timeline: not timeline.contender.startswith("LLS"))
    if not timelines:
        return None
    seconds = min(timeline.seconds for timeline in timelines)
    rows = [len(timeline.rows) for timeline in timelines]

    def plot(figure: "Figure", narrow: bool) -> None:
        panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows})
        window = seconds / 2 if narrow else seconds
        for axes, timeline in zip(panels[:, 0], timelines, strict=True):
            _draw_timeline(axes, timeline, window, narrow)
        panels[-1, 0].set_xlabel("milliseconds; gaps are bubbles")
        used = {span.kind for timeline in timelines for span in timeline.spans}
        handles = {kind: _patch(_SPANS[kind], kind) for kind in _SPANS if kind in used}
        if {"receive", "send"} <= handles.keys():
            del handles["send"]
            handles["receive"] = _patch(Ink.GREY, "receive, send")
        figure.legend(handles=list(handles.values()), loc="outside upper left", ncols=2 if narrow else 6)

    return draw(
        "timeline",
        title="The pipelines' measured timelines",
        description="; ".join(_describe_timeline(timeline, seconds) for timeline in timelines),
        plot=plot,
        wide_height=1.5 + sum(0.5 + 0.5 * n for n in rows),
        narrow_height=1.9 + sum(0.5 + 0.5 * n for n in rows),
    )


def _rows(axes: "Axes", names: Sequence[str], narrow: bool) -> None:
    """One row per name, the first on top. On a narrow chart the names stand above their bars."""
    axes.set_ylim(len(names) - 0.4, -0.9 if narrow else -0.6)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not narrow:
        axes.set_yticks(range(len(names)), names, color=Ink.TEXT)
        return
    axes.set_yticks([])
    for row, name in enumerate(names):
        axes.text(
            0,
            row - 0.45,
            name,
            transform=axes.get_yaxis_transform(),
            va="center",
            bbox={"facecolor": Ink.SURFACE, "edgecolor": "none", "pad": 1.5},  # no line strikes it through
        )


def _legend_above(figure: "Figure", axes: "Axes", *, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def _patch(colour: Ink, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _colour(contender: Contender) -> Ink:
    return FAMILY_COLOURS.get(contender.family, Ink.GREY)


def _rank(contender: Contender, shown: Sequence[Contender]) -> int:
    """Its number among the shown ones of its family."""
    return [c.name for c in shown if c.family == contender.family].index(contender.name)


def _left_of(split: StepSplit, part: str) -> float:
    names = list(_PARTS)
    return sum(getattr(split, name) for name in names[: names.index(part)])


def _curve(contender: Contender) -> tuple[list[float], list[Spread]]:
    """Mean seconds, and the accuracies over the seeds, after each evaluated epoch."""
    per_epoch = list(zip(*(run.epochs for run in contender.accuracy_runs), strict=False))
    seconds, values = [], []
    for epochs in per_epoch:
        spread = Spread.of([e.test_acc1 for e in epochs if e.test_acc1 is not None])
        if spread is not None:
            seconds.append(sum(e.seconds for e in epochs) / len(epochs))
            values.append(spread)
    return seconds, values


def _draw_timeline(axes: "Axes", timeline: TimelineExcerpt, window: float, narrow: bool) -> None:
    axes.set_title(timeline.contender)
    axes.set_ylim(len(timeline.rows) - 0.5, -0.5)
    axes.set_xlim(0, window * 1e3)
    axes.grid(axis="y", visible=False)
    names = [name.split(":")[0] if narrow else name.replace(": ", ":\n") for name in timeline.rows]
    axes.set_yticks(range(len(names)), names, color=Ink.TEXT)
    axes.tick_params(axis="y", length=0)
    for kind, colour in _SPANS.items():
        for row in range(len(timeline.rows)):
            spans = [s for s in timeline.spans if s.kind == kind and s.row == row and s.start < window]
            ranges = [(s.start * 1e3, (min(s.end, window) - s.start) * 1e3) for s in spans]
            thin = kind in ("receive", "send")
            axes.broken_barh(
                ranges,
                (row - (0.08 if thin else 0.34), 0.16 if thin else 0.68),
                facecolors=colour,
                edgecolors="none" if thin else Ink.SURFACE,
                linewidth=0.6,
            )
    character = window * (0.028 if narrow else 0.0115)
    for span in timeline.spans:
        text = str(span.microbatch) if span.chunk is None else f"{span.microbatch}.{span.chunk}"
        has_room = span.end - span.start > character * (len(text) + 0.5)
        if span.kind in ("receive", "send") or span.start < 0 or span.end > window or not has_room:
            continue
        axes.text(
            (span.start + span.end) * 500,
            span.row,
            text,
            ha="center",
            va="center_baseline",
            color=Ink.ON_COLOUR,
            size=9,
        )


def _describe_timeline(timeline: TimelineExcerpt, seconds: float) -> str:
    shares = [_busy_share(timeline, row, seconds) for row in range(len(timeline.rows))]
    return f"{timeline.contender}: at work {', '.join(f'{share:.0%}' for share in shares)} of the time"


def _busy_share(timeline: TimelineExcerpt, row: int, seconds: float) -> float:
    spans: Iterable[Any] = (s for s in timeline.spans if s.row == row and s.kind not in ("receive", "send"))
    busy, reached = 0.0, 0.0
    for span in spans:
        start, end = max(span.start, reached), min(span.end, seconds)
        if end > start:
            busy, reached = busy + end - start, end
    return busy / seconds
