"""The study of stages on the page: its chart and its tables."""

from typing import TYPE_CHECKING, Final

from unlocked.comparison.report.figures import Ink, Picture, draw
from unlocked.comparison.report.sections import Section, Table
from unlocked.comparison.stages.results import StagesStudy
from unlocked.comparison.stages.scaling_model import LOCAL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["stages_chart", "stages_section"]

_COLOURS: Final = {LOCAL: Ink.BLUE, "GPipe": Ink.AMBER, "1F1B": Ink.ORANGE, "ZB-H1": Ink.PURPLE}
_DASHES: Final = {"GPipe": (0, (6, 3)), "1F1B": "-", "ZB-H1": "-", LOCAL: "-"}


def stages_section(study: StagesStudy) -> Section:
    """Of the page, or a page of its own."""
    s, model = study.settings, study.model
    link = (
        f"a hop of {model.hop.at(s.hop_bytes) * 1e6:,.0f} us, as measured"
        if s.link_latency is None
        else f"a link of {s.link_latency:g} us and {s.link_bandwidth:g} GB/s"
    )
    return Section(
        key="stages",
        title="Throughput against stages",
        paragraphs=(
            f"Every stage holds {s.blocks_per_stage} equal convolutional blocks ({s.chain.channels} channels, "
            f"{s.chain.image_size} x {s.chain.image_size} pixels, batch {s.chain.batch_size}), so the network grows "
            f"with the pipeline and an ideal pipeline stays level. Dots were measured on {s.cores} cores; hollow ones "
            "had more processes than cores. Lines are simulated, with a core of this machine's speed "
            f"{'' if s.speed == 1 else f'times {s.speed:g} '}for each stage and {link}.",
            f"Backpropagation adds up {s.microbatches} micro-batches for one step and drains before it; its thin line "
            "is 1F1B with four micro-batches per stage, a batch that grows with the pipeline. Dotted: stages whose "
            f"speeds differ by {s.spread:.0%} (log-normal). Splitting its backward pass is granted to be free.",
            f"Fitted: {model.step.slope * 1e3:.3f} ms per block (residuals up to {model.step.largest_residual:.1%}); a "
            f"hop of {model.hop.intercept * 1e6:.0f} us + {model.hop.slope * 2**20 * 1e6:.0f} us per MiB (residuals up "
            f"to {model.hop.largest_residual:.1%}).",
        ),
        pictures=(stages_chart(study),),
        tables=(_measured_table(study), _predicted_table(study)),
    )


def stages_chart(study: StagesStudy) -> Picture:
    """Images per second against stages, both logarithmic; measured points upon the predictions."""
    s = study.settings

    from matplotlib.ticker import LogLocator

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        for schedule in study.schedules:
            colour, dash = _COLOURS[schedule], _DASHES[schedule]
            for spread in sorted({0.0, s.spread}):
                points = study.of(schedule, spread=spread)
                style = {"linestyle": ":", "linewidth": 1.5} if spread else {"linestyle": dash, "label": schedule}
                axes.plot(
                    [p.stages for p in points],
                    [study.images_per_second(p) for p in points],
                    color=colour,
                    **style,
                )
        growing = study.of("1F1B", growing=True)
        axes.plot(
            [p.stages for p in growing],
            [study.images_per_second(p) for p in growing],
            color=Ink.ORANGE,
            linewidth=1,
            label="1F1B, growing batch",
        )
        for m in study.measured:
            axes.plot([m.stages] * 2, [m.low, m.high], color=Ink.TEXT, linewidth=1.2, zorder=5)
        for hollow in (False, True):
            chosen = [m for m in study.measured if m.oversubscribed is hollow]
            axes.plot(
                [m.stages for m in chosen],
                [m.images_per_second for m in chosen],
                "o",
                color=Ink.TEXT,
                markerfacecolor=Ink.SURFACE if hollow else Ink.TEXT,
                markersize=6,
                zorder=6,
                label="measured, cores shared" if hollow else "measured",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
        counts = [p.stages for p in study.of(LOCAL)]
        shown = counts[:: 2 if narrow and len(counts) > 6 else 1]
        axes.set_xticks(shown, [f"{count:,}" for count in shown])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("stages")
        axes.set_ylabel("images per second")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2 if narrow else 4)

    deepest = study.of(LOCAL)[-1].stages
    return draw(
        "stages",
        title="Throughput against stages",
        description=f"predicted with {deepest:,} stages: "
        + "; ".join(
            f"{name} {study.images_per_second(study.of(name)[-1]):,.0f} images per second" for name in study.schedules
        ),
        plot=plot,
        wide_height=4.6,
        narrow_height=5.0,
    )


def _measured_table(study: StagesStudy) -> Table:
    rows = []
    for m in study.measured:
        error = study.error(m)
        rows.append(
            [
                str(m.stages),
                f"{m.images_per_second:,.0f}",
                f"{m.low:,.0f} to {m.high:,.0f}",
                "–" if error is None else f"{1 + error:.2f}",
                "shared" if m.oversubscribed else "one each",
            ]
        )
    return Table(
        caption=f"Measured, {study.settings.repeats} interleaved runs",
        head=["stages", "images/s", "slowest to fastest", "predicted / measured", "cores"],
        rows=rows,
    )


def _predicted_table(study: StagesStudy) -> Table:
    rows = []
    for schedule in study.schedules:
        spread = {p.stages: p for p in study.of(schedule, spread=study.settings.spread)}
        for p in study.of(schedule):
            rows.append(
                [
                    schedule,
                    f"{p.stages:,}",
                    f"{study.images_per_second(p):,.0f}",
                    f"{study.images_per_second(spread[p.stages]):,.0f}",
                    f"{p.efficiency:.1%}",
                    f"{p.fill_seconds * 1e3:,.1f}",
                    f"{p.drain_seconds * 1e3:,.1f}",
                ]
            )
    return Table(
        caption="Predicted; LLS fills and drains once a run, BP at every step",
        head=["schedule", "stages", "images/s", "unequal stages", "slowest stage at work", "fill, ms", "drain, ms"],
        rows=rows,
    )
