"""The memory study on the page: its chart and its table."""

from typing import TYPE_CHECKING, Final

from unlocked.comparison.memory.results import ACCUMULATED, BP, CHECKPOINTED, MemoryStudy
from unlocked.comparison.report.figures import FAMILY_COLOURS, Ink, Picture, draw
from unlocked.comparison.report.sections import Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["memory_chart", "memory_section"]

_COLOURS: Final = {**FAMILY_COLOURS, BP: Ink.ORANGE, CHECKPOINTED: Ink.AMBER, ACCUMULATED: Ink.GREY}


def memory_section(study: MemoryStudy) -> Section:
    """Of the page, or a page of its own."""
    s = study.settings
    rows = [
        [
            p.method,
            str(p.depth),
            f"{p.activation_bytes / 2**20:,.3f}",
            f"{p.persistent_bytes / 2**20:,.3f}",
            f"{p.held_bytes:,}",
        ]
        for method in study.methods
        for p in study.of(method)
    ]
    slopes = ", ".join(f"{method} {study.slope(method)[0] / 1024:,.1f} KiB per block" for method in study.methods)
    return Section(
        key="memory",
        title="Activation memory against depth",
        paragraphs=(
            f"Chains of equal 3x3 convolutional blocks: {s.channels} channels, {s.image_size} x {s.image_size} pixels, "
            f"batch {s.batch_size}, on {s.device}. Counted at the allocator, to the byte. A local rule frees a layer's "
            "activations before the next layer runs; backpropagation keeps them until it comes back.",
            f"Slope of the line through the points: {slopes}.",
        ),
        pictures=(memory_chart(study),),
        tables=(
            Table(
                caption="Peak memory of a step",
                head=["method", "blocks", "activations, MiB", "weights and states, MiB", "kept between steps, bytes"],
                rows=rows,
            ),
        ),
    )


def memory_chart(study: MemoryStudy) -> Picture:
    """Peak activation memory against depth, both axes logarithmic."""

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        for number, method in enumerate(study.methods):
            points = study.of(method)
            colour = _COLOURS.get(method, Ink.BLUE)
            depths, sizes = [p.depth for p in points], [p.activation_bytes / 2**20 for p in points]
            axes.plot(depths, sizes, "o-", color=colour, markersize=5, label=method, zorder=3 + number)
            axes.annotate(
                f"{method}\n{sizes[-1]:,.1f} MiB" if sizes[-1] < 100 else f"{method}\n{sizes[-1]:,.0f} MiB",
                (depths[-1], sizes[-1]),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                annotation_clip=False,
            )
        depths = sorted({point.depth for point in study.points})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlim(depths[0] * 0.9, depths[-1] * (6.5 if narrow else 2.4))
        axes.set_xlabel("equal blocks")
        axes.set_ylabel("peak activations, MiB")

    return draw(
        "memory",
        title="Activation memory against depth",
        description="; ".join(
            f"{method} {study.slope(method)[0] / 1024:,.2f} KiB per block" for method in study.methods
        ),
        plot=plot,
        wide_height=3.6,
        narrow_height=3.8,
    )
