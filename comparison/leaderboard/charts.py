"""The leaderboard's charts, each from a table to a picture."""

from typing import TYPE_CHECKING

from unlocked.comparison.leaderboard.board import REFERENCE, Table
from unlocked.comparison.leaderboard.results import Row
from unlocked.comparison.report.figures import Ink, Picture, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["accuracy_chart", "speed_chart"]


def accuracy_chart(table: Table, name: str) -> Picture | None:
    """Test accuracy: a dot per seed, a mark at the mean, a line of one deviation to both sides."""
    shown = table.trained
    if not shown:
        return None
    reference = table.reference

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        if reference is not None:
            axes.axvline(reference.mean or 0, color=Ink.ORANGE, linestyle="--", linewidth=1.2)
        for place, row in enumerate(shown):
            mean, deviation = row.mean or 0, row.deviation or 0
            axes.plot([mean - deviation, mean + deviation], [place, place], color=_colour(row), linewidth=3, alpha=0.5)
            axes.plot(row.accuracies, [place] * len(row.accuracies), "o", color=_colour(row), markersize=3, alpha=0.6)
            axes.plot([mean], [place], "D", color=_colour(row), markersize=7)
            axes.annotate(
                f"{mean:.2f}", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize="small"
            )
        axes.set_yticks(range(len(shown)), [row.rule for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.9)
        axes.margins(x=0.08)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("test accuracy, %")

    return draw(
        f"{name}-accuracy",
        title="Accuracy",
        description="; ".join(f"{row.rule} {row.mean:.2f} %" for row in shown),
        plot=plot,
        wide_height=0.9 + 0.42 * len(shown),
        narrow_height=0.9 + 0.48 * len(shown),
    )


def speed_chart(table: Table, name: str) -> Picture | None:
    """Images per second: in one process, and as a pipeline."""
    shown = [(row, m) for row in table.rows if (m := row.measures) is not None and m.images_per_second is not None]
    if not shown:
        return None
    top = max(max(m.images_per_second or 0, m.pipeline_images_per_second or 0) for _, m in shown)

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        for place, (row, measures) in enumerate(shown):
            for offset, rate, colour in (
                (-0.19, measures.images_per_second, Ink.GREY),
                (0.19, measures.pipeline_images_per_second, _colour(row)),
            ):
                if rate is not None:
                    axes.barh(place + offset, rate, height=0.34, color=colour)
                    axes.text(rate + 0.01 * top, place + offset, f"{rate:,.0f}", va="center", fontsize="small")
        axes.set_yticks(range(len(shown)), [row.rule for row, _ in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, top * (1.3 if narrow else 1.12))
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4 if narrow else 8)
        axes.set_xlabel("images per second")

    return draw(
        f"{name}-speed",
        title="Speed",
        description="; ".join(_rates(row, m.images_per_second, m.pipeline_images_per_second) for row, m in shown),
        plot=plot,
        wide_height=0.9 + 0.5 * len(shown),
        narrow_height=0.9 + 0.56 * len(shown),
    )


def _rates(row: Row, alone: float | None, piped: float | None) -> str:
    told = f"{row.rule} {alone or 0:,.0f} images per second in one process"
    return told if piped is None else f"{told}, {piped:,.0f} as a pipeline"


def _colour(row: Row) -> Ink:
    """What is not local, by its audit, is told apart."""
    found = row.measures.inspection if row.measures is not None else None
    if row.rule == REFERENCE:
        return Ink.ORANGE
    return Ink.PINK if found is not None and found.is_local is False else Ink.BLUE
