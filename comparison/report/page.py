"""The report as one HTML file that opens offline: nothing in it is fetched, whatever the browser."""

from collections.abc import Sequence
from pathlib import Path

from unlocked.comparison.report import charts
from unlocked.comparison.report.layers import CAPTION, LayerAccuracies, layers_charts
from unlocked.comparison.report.sections import Headline, Section, Table, render
from unlocked.comparison.report.verdict import verdict
from unlocked.comparison.results import Report, Spread
from unlocked.runtime.saving.whole_file import write_whole

__all__ = ["write_page"]

_NONE = "–"


def write_page(report: Report, path: Path, *, studies: Sequence[Section] = ()) -> None:
    """Writes the comparison's page.

    Args:
        studies: their sections, which stand before the conditions.

    Raises:
        ValueError: matplotlib or jinja2 is not installed.
    """
    sections = [
        _throughput_section(report),
        _accuracy_section(report),
        _layers_section(report),
        _split_section(report),
        _timeline_section(report),
        _logged_section(report),
        *studies,
        _conditions_section(report),
    ]
    missing = [c for c in report.contenders if c.status != "measured"]
    headline = Headline(sentence=verdict(report), conditions=_conditions(report))
    text = render("Local learning against backpropagation", headline, [s for s in sections if s is not None], missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _throughput_section(report: Report) -> Section | None:
    picture = charts.throughput_chart(report)
    if picture is None:
        return None
    head = [
        "contender",
        "images/s",
        "slowest to fastest",
        "runs",
        "bubbles",
        "peak memory, MiB",
        "of that its own",
        "J/image",
    ]
    has_energy = any(c.joules_per_image is not None for c in report.contenders)
    rows = []
    for c in report.measured:
        memory = [_mebibytes(c.peak_memory_bytes), _mebibytes(c.own_memory_bytes)]
        row = [c.name, *_median_and_range(c.images_per_second), _percent(c.bubble_share), *memory]
        rows.append([*row, _number(c.joules_per_image, "{:.4f}")] if has_energy else row)
    return Section(
        key="throughput",
        title="Throughput",
        paragraphs=(
            "Training only. The contenders' runs took turns, so that a machine that drifts favours nobody. Memory is "
            + ("what torch allocated" if report.settings.device.startswith("cuda") else "each process's resident set")
            + ", at its highest, one figure per process; its own is what libraries and data leave of it.",
        ),
        pictures=(picture,),
        tables=(Table(caption="Throughput", head=head if has_energy else head[:-1], rows=rows),),
    )


def _mebibytes(sizes: Sequence[int]) -> str:
    return " + ".join(f"{size / 2**20:,.0f}" for size in sizes) or _NONE


def _accuracy_section(report: Report) -> Section | None:
    picture = charts.accuracy_chart(report)
    if picture is None:
        return None
    rows = []
    for c in report.measured:
        accuracy, seconds = c.test_acc1, c.train_seconds
        if accuracy is not None and seconds is not None:
            spread = f"± {accuracy.deviation:.2f}" if accuracy.count > 1 else "one seed"
            rows.append([c.name, f"{accuracy.mean:.2f}", spread, f"{seconds.median:.1f}"])
    s = report.settings
    return Section(
        key="accuracy",
        title="Accuracy",
        paragraphs=(
            f"{s.epochs} epochs, evaluated after each; seeds {', '.join(map(str, s.seeds))}. All ways to run a local "
            "rule compute the same numbers (with other numbers of threads up to rounding), so only time tells them "
            "apart; BP in a pipeline cuts its batches, and BatchNorm sees one chunk at a time. Drawn are each rule's "
            "first contender, its fastest, and its fastest pipeline; the table has all.",
        ),
        pictures=(picture,),
        tables=(
            Table(
                caption="Test accuracy after the last epoch",
                head=["contender", "mean, %", "deviation", "time to train, s"],
                rows=rows,
            ),
        ),
    )


def _layers_section(report: Report) -> Section | None:
    """Of the first run of every local rule: what runs it makes no difference."""
    found: dict[str, LayerAccuracies] = {}
    for contender in report.measured:
        runs = [run for run in contender.accuracy_runs if run.epochs and len(run.epochs[-1].layer_acc1) > 1]
        if runs and contender.family not in found:
            epochs = runs[0].epochs
            first = dict(epochs[0].layer_acc1) if len(epochs) > 1 else None
            found[contender.family] = LayerAccuracies(last=dict(epochs[-1].layer_acc1), first=first)
    pictures = layers_charts(found, "report")
    if not pictures:
        return None
    return Section(key="layers", title="Which layer has learned what", paragraphs=(CAPTION,), pictures=tuple(pictures))


def _split_section(report: Report) -> Section | None:
    picture = charts.split_chart(report)
    if picture is None:
        return None
    rows = [
        [
            c.name,
            str(number),
            *(f"{seconds * 1e3:.3f}" for seconds in (split.data, split.compute, split.wait, split.update, split.total)),
        ]
        for c in report.measured
        for number, split in enumerate(c.split)
    ]
    return Section(
        key="split",
        title="Where a step's time goes",
        paragraphs=(
            "Of the run with the median throughput, per training micro-batch and process. Wait is time for a "
            "neighbour's message or a free slot, and copying.",
        ),
        pictures=(picture,),
        tables=(
            Table(
                caption="Milliseconds per micro-batch",
                head=["contender", "process", "data", "compute", "wait", "update", "all"],
                rows=rows,
            ),
        ),
    )


def _timeline_section(report: Report) -> Section | None:
    picture = charts.timeline_chart(report)
    if picture is None:
        return None
    return Section(
        key="timeline",
        title="The pipelines' measured timelines",
        paragraphs=(
            "The same length of time from the middle of a measured run each. Numbers are micro-batches; 12.3 is the "
            "fourth chunk of micro-batch 12. A stage of local learning updates all its layers but the last within its "
            "forward action; it hands its output on and goes on. Backpropagation waits for gradients and drains before "
            "every update.",
        ),
        pictures=(picture,),
    )


def _logged_section(report: Report) -> Section | None:
    logged, picture = report.logged, charts.logged_chart(report)
    if logged is None or picture is None:
        return None
    rows = [
        [
            family,
            f"{t.total_minutes:g}",
            f"{t.seconds_per_step * 1e3:.1f}",
            f"{t.data_seconds_per_step * 1e3:.1f}",
            f"{t.test_acc1:.1f}",
        ]
        for family, t in logged.trainings.items()
    ]
    minutes = " against ".join(f"{t.total_minutes:g} minutes by {family}" for family, t in logged.trainings.items())
    return Section(
        key="logged",
        title="Beside the logged run",
        paragraphs=(
            f"The training log that this project is measured against: {logged.model} on {logged.dataset}, "
            f"{logged.epochs} epochs, {minutes}. Its hardware is not named, so only its ratio may stand beside the "
            "figures of this page.",
        ),
        pictures=(picture,),
        tables=(
            Table(
                caption="The logged run",
                head=["rule", "minutes", "ms per step", "of which data", "test accuracy, %"],
                rows=rows,
            ),
        ),
    )


def _conditions_section(report: Report) -> Section:
    e, s = report.environment, report.settings
    gigabytes = "" if e.memory_bytes is None else f", {e.memory_bytes / 2**30:.0f} GiB"
    facts = [
        ("command", s.command),
        ("processor", f"{e.cpu}, {e.cores} cores{gigabytes}"),
        ("GPU", ", ".join(e.gpus) or "none"),
        ("system", f"{e.platform}, Python {e.python}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in e.versions.items())),
        *([("commit", e.commit)] if e.commit else []),
        ("started", e.started_at),
        ("network", f"{s.model}: {', '.join(s.layers)}"),
        (
            "data",
            f"{s.dataset}: {s.train_images:,} images of {' x '.join(map(str, s.image_shape))}, "
            f"{s.test_images:,} to test",
        ),
        ("step", f"batch {s.batch_size}, {s.optimizer}, learning rate {s.lr:g}, weight decay {s.weight_decay:g}"),
        ("local loss", f"temperature {s.temperature:g}, {s.waveform} basis, label smoothing {s.label_smoothing:g}"),
        (
            "runs",
            f"{s.repeats} of {s.speed_steps} steps each for speed; {len(s.seeds)} of {s.epochs} epochs for accuracy",
        ),
    ]
    rows = [
        [
            c.name,
            f"{c.processes} x {c.threads}",
            " | ".join(", ".join(stage) for stage in c.stages) or _NONE,
            str(c.chunks or _NONE),
            c.status if c.status == "measured" else f"{c.status}: {c.reason}",
            c.note,
        ]
        for c in report.contenders
    ]
    return Section(
        key="conditions",
        title="What ran on what",
        tables=(
            Table(
                caption="All contenders",
                head=["contender", "processes x threads", "stages", "chunks", "status", "note"],
                rows=rows,
                words=(2, 4, 5),
            ),
        ),
        facts=facts,
    )


def _conditions(report: Report) -> list[str]:
    s, e = report.settings, report.environment
    machine = ", ".join(e.gpus) if s.device.startswith("cuda") and e.gpus else e.cpu
    accuracy = f"accuracy after {s.epochs} epochs, {len(s.seeds)} seed{'s' if len(s.seeds) != 1 else ''}"
    return [
        f"{s.optimizer}, learning rate {s.lr:g}",
        machine,
        f"medians of {s.repeats} interleaved runs of {s.speed_steps} steps",
        *([accuracy] if s.seeds else []),
    ]


def _median_and_range(spread: Spread | None) -> list[str]:
    if spread is None:
        return [_NONE, _NONE, "0"]
    return [f"{spread.median:,.0f}", f"{spread.low:,.0f} to {spread.high:,.0f}", str(spread.count)]


def _percent(spread: Spread | None) -> str:
    return _NONE if spread is None else f"{spread.median:.1%}"


def _number(spread: Spread | None, form: str) -> str:
    return _NONE if spread is None else form.format(spread.median)
