"""Saved runs beside each other: curves and a table, as one page that opens offline, or as a picture."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from unlocked.comparison.report.figures import Ink, Picture, draw, plain_label, require_plotting
from unlocked.comparison.report.layers import CAPTION, LayerAccuracies, layers_charts
from unlocked.comparison.report.sections import Headline, Section, Table, render
from unlocked.comparison.saved_runs import SavedRun, table_of
from unlocked.runtime.saving.whole_file import whole_file, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMS", "write_runs"]

_INKS: Final = (Ink.BLUE, Ink.ORANGE, Ink.TEAL, Ink.PURPLE, Ink.PINK, Ink.AMBER, Ink.GREY)
_DASHES: Final = ("-", "--", ":", "-.")
_CURVES: Final[Mapping[str, str]] = {
    "eval_acc1": "test accuracy, %",
    "eval_loss": "test loss",
    "train_loss": "training loss",
}


def write_runs(runs: Sequence[SavedRun], path: Path) -> None:
    """Writes the runs' page, picture or table, as the file's name ends.

    Raises:
        ValueError: the name ends in none of `FORMS`, or what draws is not installed.
    """
    form = path.suffix.lower()
    if form not in FORMS:
        raise ValueError(f"--output {path} ends in {form or 'nothing'}; give a file that ends in {', '.join(FORMS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    FORMS[form](runs, path)


def _write_page(runs: Sequence[SavedRun], path: Path) -> None:
    require_plotting()
    table = table_of(runs)
    sections = [
        Section(key=column, title=title.capitalize().removesuffix(", %"), pictures=(_picture(runs, column, title),))
        for column, title in _CURVES.items()
        if any(run.curve(column) for run in runs)
    ]
    if pictures := layers_charts(_by_layer(runs), "runs"):
        title = "Which layer has learned what"
        sections.append(Section(key="layers", title=title, paragraphs=(CAPTION,), pictures=tuple(pictures)))
    numbers = Section(
        key="runs",
        title="The runs",
        paragraphs=("Settings that all runs share are left out.",),
        tables=(Table(caption="Runs", head=table.head, rows=table.rows),),
    )
    write_whole(path, render("Saved runs", _headline(runs), [numbers, *sections]))


def _write_picture(runs: Sequence[SavedRun], path: Path) -> None:
    require_plotting()
    from matplotlib.figure import Figure

    shown = [(column, title) for column, title in _CURVES.items() if any(run.curve(column) for run in runs)]
    figure = Figure(figsize=(10, 1 + 3.2 * max(len(shown), 1) + 0.2 * len(runs)), layout="constrained")
    panels = figure.subplots(max(len(shown), 1), 1, squeeze=False)[:, 0]
    for axes, (column, title) in zip(panels, shown, strict=False):
        _plot(axes, runs, column, title, [f"C{n % 10}" for n in range(len(runs))])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _write_table(runs: Sequence[SavedRun], path: Path) -> None:
    table, text = table_of(runs), StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.head, *table.rows])
    write_whole(path, text.getvalue())


FORMS = {".html": _write_page, ".png": _write_picture, ".csv": _write_table}
"""How a file's name ends -> what writes it."""


def _by_layer(runs: Sequence[SavedRun]) -> dict[str, LayerAccuracies]:
    return {
        run.name: LayerAccuracies(last=told[-1], first=told[0] if len(told) > 1 else None)
        for run in runs
        if (told := run.layer_accuracies())
    }


def _headline(runs: Sequence[SavedRun]) -> Headline:
    ranked = sorted((run for run in runs if run.best), key=lambda run: run.best[1] if run.best else 0.0, reverse=True)
    if not ranked:
        return Headline(sentence=f"{len(runs)} runs, none of which was evaluated.")
    best = ranked[0].best
    assert best is not None
    sentence = f"{ranked[0].name} came to {best[1]:.2f} % test accuracy in epoch {best[0]}"
    if len(ranked) > 1 and (last := ranked[-1].best) is not None:
        sentence += f", {ranked[-1].name} to {last[1]:.2f} %"
    return Headline(sentence=f"{sentence}.", conditions=[f"{len(runs)} runs", "best epoch of each, one run each"])


def _picture(runs: Sequence[SavedRun], column: str, title: str) -> Picture:
    inks = [_INKS[number % len(_INKS)].value for number in range(len(runs))]

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _plot(axes, runs, column, title, inks)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=1 if narrow else 2)

    shown = [(run.name, curve[-1][1]) for run in runs if (curve := run.curve(column))]
    return draw(
        column,
        title=title,
        description="; ".join(f"{name} {value:.4g} in the end" for name, value in shown),
        plot=plot,
        wide_height=3.4 + 0.24 * -(-len(shown) // 2),
        narrow_height=3.2 + 0.28 * len(shown),
    )


def _plot(axes: "Axes", runs: Sequence[SavedRun], column: str, title: str, colours: Sequence[str]) -> None:
    for number, run in enumerate(runs):
        if curve := run.curve(column):
            epochs, values = zip(*curve, strict=True)
            dash = _DASHES[number // len(_INKS) % len(_DASHES)]
            axes.plot(
                epochs, values, dash, marker="o", markersize=3, color=colours[number], label=plain_label(run.name)
            )
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("epochs")
    axes.set_ylabel(title)
