"""The report on a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from unlocked.comparison.logged import LoggedRun
from unlocked.comparison.report.verdict import verdict
from unlocked.comparison.results import Contender, Report, Spread

__all__ = ["print_report"]


def print_report(report: Report, console: Console | None = None) -> None:
    """Speed, accuracy, failures, the logged run, and the verdict."""
    console = console or Console()
    settings, environment = report.settings, report.environment
    console.print(
        f"{settings.model} on {settings.dataset} ({settings.train_images:,} images), batch {settings.batch_size}, "
        f"{settings.optimizer}, learning rate {settings.lr:g}, on {settings.device}\n"
        f"{environment.line}",
        highlight=False,
    )
    if report.measured:
        console.print(_speed_table(report))
        console.print(_step_table(report))
    if any(contender.accuracy_runs for contender in report.measured):
        console.print(_accuracy_table(report))
    for contender in report.contenders:
        if contender.status != "measured":
            console.print(f"{contender.name}: {contender.status}: {contender.reason}", highlight=False, markup=False)
    for contender in report.measured:
        if contender.is_pipeline:
            console.print(_form(contender), highlight=False, markup=False)
    if report.logged is not None:
        console.print(_logged(report.logged), highlight=False, markup=False)
    console.print(verdict(report), style="bold", highlight=False, markup=False)


def _speed_table(report: Report) -> Table:
    first = next((c for c in report.measured if c.family == "BP" and c.engine == "sequential"), report.measured[0])
    base = first.images_per_second
    has_energy = any(contender.joules_per_image for contender in report.measured)
    columns = ["images/s", "lowest to highest", "x", "own MiB", *(["mJ/image"] if has_energy else [])]
    table = _table(f"Speed (x: times {first.name})", *columns)
    for contender in report.measured:
        rate, energy = contender.images_per_second, contender.joules_per_image
        assert rate is not None
        cells = [
            contender.name,
            f"{rate.median:,.0f}",
            f"{rate.low:,.0f} to {rate.high:,.0f}" if rate.count > 1 else "",
            f"{rate.median / base.median:.2f}" if base else "",
            "+".join(f"{size / 2**20:,.0f}" for size in contender.own_memory_bytes) or "-",
        ]
        table.add_row(*cells, *([f"{1000 * energy.median:.2f}" if energy else "-"] if has_energy else []))
    return table


def _step_table(report: Report) -> Table:
    title = "Where a step's milliseconds go, mean over the processes"
    table = _table(title, "step", "data", "compute", "wait", "update", "bubbles")
    for contender in report.measured:
        bubbles = contender.bubble_share
        shown = f"{bubbles.median:.0%}" if bubbles and contender.is_pipeline else ""
        table.add_row(contender.name, *_split(contender), shown)
    return table


def _table(title: str, *columns: str) -> Table:
    """Narrow enough for 80 columns, where a figure that is cut off tells nothing."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _split(contender: Contender) -> list[str]:
    """Milliseconds of a step, and its four parts."""
    parts = contender.split
    if not parts:
        rate = contender.images_per_second
        run = contender.runs[0]
        assert rate is not None
        return [f"{1000 * run.train_seconds / run.steps:.2f}", "-", "-", "-", "-"]
    columns = zip(*((part.total, part.data, part.compute, part.wait, part.update) for part in parts), strict=True)
    return [f"{1000 * sum(column) / len(parts):.2f}" for column in columns]


def _accuracy_table(report: Report) -> Table:
    settings = report.settings
    count = len(settings.seeds)
    title = (
        f"Accuracy after {settings.epochs} epochs, {count} seed{'s' if count > 1 else ''}: mean ± standard deviation"
    )
    table = _table(title, "test accuracy %", "test loss", "seconds to train")
    for contender in report.measured:
        runs = contender.accuracy_runs
        if not runs:
            continue
        losses = Spread.of([loss for run in runs if run.epochs and (loss := run.epochs[-1].test_loss) is not None])
        table.add_row(
            contender.name,
            _with_deviation(contender.test_acc1),
            f"{losses.mean:.4f}" if losses else "-",
            _with_deviation(contender.train_seconds),
        )
    return table


def _with_deviation(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.2f} ± {spread.deviation:.2f}" if spread.count > 1 else f"{spread.mean:.2f}"


def _form(contender: Contender) -> str:
    stages = " | ".join(", ".join(stage) for stage in contender.stages)
    text = f"{contender.name}: stages {stages}"
    if contender.chunks is not None:
        plural = "s" if contender.chunks > 1 else ""
        text += f"; {contender.chunks} chunk{plural}, the fastest of {len(contender.trials)} forms; {contender.note}"
    return text


def _logged(logged: LoggedRun) -> str:
    parts = [
        f"{family} {training.total_minutes:g} minutes, {training.test_acc1:g} %"
        for family, training in logged.trainings.items()
    ]
    return f"For reference, the authors' logged run ({logged.epochs} epochs, other hardware): {'; '.join(parts)}"
