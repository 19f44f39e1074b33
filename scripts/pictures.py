"""Draws the documents' pictures: from the simulator, from counts that don't depend on a machine, from a real trace.

    python scripts/pictures.py          # writes docs/images/*.svg
    python scripts/pictures.py --check  # says which of them are not what would be drawn

Each is drawn wide and narrow. A file opened by itself follows the reader's light or dark scheme; a page that holds the
picture inline gives it its own colours.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from unlocked.comparison.memory.page import memory_chart
from unlocked.comparison.memory.results import MemoryStudy
from unlocked.comparison.report.figures import Ink, Picture, draw
from unlocked.comparison.report.layers import LayerAccuracies, layers_charts
from unlocked.runtime.schedules.backpropagation import backpropagation_schedule
from unlocked.runtime.schedules.schedule import build_schedule
from unlocked.runtime.schedules.simulate import Costs, simulate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Edge, Timeline
from unlocked.workers.actions import ActionKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = RESULTS / "memory_cpu_2026-11-28.json"
LAYERS = RESULTS / "layers_smallconv-digits_2026-11-28.json"
TRACE = RESULTS / "trace_smallconv_epyc-2-cores_2026-11-28.json"

_F, _U, _E, _B, _W = ActionKind.F, ActionKind.U, ActionKind.E, ActionKind.B, ActionKind.W
# One unit of time is a forward pass; each gradient is as much arithmetic. A local step has no gradient of its input.
_LOCAL: Final = {"forward": 1.0, "update": 1.0, "evaluate": 1.0}
_BACKPROPAGATION: Final = {_F: 1.0, _B: 1.0, _W: 1.0, _U: 0.0}

Bar = tuple[int, float, float, Ink, str]  # row, start, end, colour, what is written upon it


def pipelines() -> Picture:
    """Four stages of a local rule above four of backpropagation, in the same length of time."""
    local = simulate(
        build_schedule(4, StreamPlan(epochs=1, train_size=20, batch_size=1)), Costs.uniform(4, **_LOCAL), 2
    )
    rival = simulate(backpropagation_schedule("1F1B", 4, 4, 2), Costs([_BACKPROPAGATION] * 4, [0.0] * 3), 4)
    length = rival.makespan
    colours = {_F: Ink.BLUE, _U: Ink.TEAL, _B: Ink.ORANGE, _W: Ink.AMBER}
    panels = (("Local rule: a stage learns as it goes", local), ("Backpropagation, 1F1B, two steps of four", rival))

    def plot(figure: "Figure", narrow: bool) -> None:
        window = length * (0.6 if narrow else 1.0)
        for axes, (title, timeline) in zip(figure.subplots(2, 1, sharex=True), panels, strict=True):
            _rows(axes, [f"stage {stage}" for stage in range(4)])
            axes.set_title(title)
            _draw_bars(axes, _bars(timeline, colours), window, narrow)
        axes.set_xlabel("time; one forward is 1, gaps are bubbles")
        words = {"forward": _F, "local update": _U, "input gradient": _B, "weight gradient": _W}
        _legend(figure, {word: colours[kind] for word, kind in words.items()}, columns=2 if narrow else 4)

    learned, rivals = (
        sum(stage == 3 and action.kind is kind and end <= length for stage, action, _, end in timeline.spans)
        for timeline, kind in ((local, _U), (rival, _W))
    )
    return draw(
        "pipelines",
        title="A pipeline of a local rule, and one of backpropagation",
        description=f"in the same {length:g} units of time the last of four stages learns from {learned} micro-batches "
        f"by a local rule, which fills once, and from {rivals} by backpropagation, which drains at every step",
        plot=plot,
        wide_height=5.0,
        narrow_height=5.4,
    )


def seams() -> Picture:
    """Two epochs with an evaluation after each: no stage waits at the seam."""
    plan = StreamPlan(epochs=2, train_size=6, batch_size=1, eval_size=3, eval_batch_size=1, statistics_batches=0)
    timeline = simulate(build_schedule(3, plan), Costs.uniform(3, **_LOCAL), 2)
    epoch = {item.position: item.epoch for item in plan}

    def bars() -> list[Bar]:
        found: list[Bar] = []
        for stage, action, start, end in timeline.spans:
            if action.kind in (_F, _U):
                colour = Ink.BLUE if epoch[action.microbatch] == 0 else Ink.TEAL
                found.append((stage, start, end, colour, str(action.microbatch) if action.kind is _F else ""))
            elif action.kind is _E:
                found.append((stage, start, end, Ink.ORANGE, str(action.microbatch)))
        return found

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _rows(axes, [f"stage {stage}" for stage in range(3)])
        _draw_bars(axes, bars(), timeline.makespan * (0.62 if narrow else 1.0), narrow)
        axes.set_xlabel("time; numbers are positions in the stream")
        words = {"training, epoch 1": Ink.BLUE, "evaluation": Ink.ORANGE, "training, epoch 2": Ink.TEAL}
        _legend(figure, words, columns=2 if narrow else 3)

    steady = sum(bubble.steady for bubble in timeline.bubbles)
    return draw(
        "seams",
        title="Epochs and evaluations are marks in one stream",
        description="stage 0 trains in epoch 2 while stage 2 still evaluates epoch 1; between its first action and its "
        f"last one no stage waits: {steady:g} units of time",
        plot=plot,
        wide_height=2.9,
        narrow_height=3.2,
    )


def queues() -> Picture:
    """How far a fast stage runs ahead of a slow one, for three depths of the queue."""
    depths = (1, 2, 4)
    plan = StreamPlan(epochs=1, train_size=16, batch_size=1)
    costs = Costs.uniform(2, **_LOCAL, scale=[1.0, 1.6])
    edges = [simulate(build_schedule(2, plan), costs, depth).edges[0] for depth in depths]

    def plot(figure: "Figure", narrow: bool) -> None:
        panels = figure.subplots(len(depths), 1, sharex=True)
        for axes, depth, edge in zip(panels, depths, edges, strict=True):
            times, taken = _slots(edge)
            axes.fill_between(times, taken, step="post", color=Ink.BLUE, alpha=0.35, linewidth=0)
            axes.step(times, taken, where="post", color=Ink.BLUE, linewidth=1.8)
            axes.axhline(depth, color=Ink.ORANGE, linewidth=1.6, linestyle="--")
            axes.set_ylim(0, max(depths) + 0.6)
            axes.set_yticks(range(0, max(depths) + 1, 2))
            axes.set_xlim(0, 32 if narrow else 54)
            axes.set_title(f"--queue-depth {depth}")
        panels[1].set_ylabel("slots taken")
        panels[-1].set_xlabel("time; one forward of stage 0 is 1")
        _legend(figure, {"slots taken": Ink.BLUE, "the most there are": Ink.ORANGE}, columns=2)

    return draw(
        "queues",
        title="A queue between a fast stage and a slow one",
        description="; ".join(
            f"depth {depth}: at most {edge.max_in_flight} micro-batches in flight"
            for depth, edge in zip(depths, edges, strict=True)
        ),
        plot=plot,
        wide_height=4.6,
        narrow_height=4.8,
    )


def memory() -> Picture:
    """Peak activation memory against depth, counted at the allocator."""
    return memory_chart(MemoryStudy.load(MEMORY))


def layers() -> Picture:
    """Which layer of a small network has learned what, by three rules."""
    runs = json.loads(LAYERS.read_text())["runs"]
    (picture,) = layers_charts({rule: LayerAccuracies(**told) for rule, told in runs.items()}, "pictures")
    return picture


def traced() -> Picture:
    """A part of a real run's trace, after it has filled."""
    events = [event for event in json.loads(TRACE.read_text())["traceEvents"] if event["ph"] == "X"]
    first, last = 16, 26
    begin = min(e["ts"] for e in events if e["cat"] == "F" and e["name"].endswith(f"F{first}"))
    end = max(e["ts"] + e["dur"] for e in events if e["cat"] == "U" and e["name"].endswith(f"U{last}"))
    colours = {"F": Ink.BLUE, "U": Ink.TEAL, "RECV": Ink.GREY, "SEND": Ink.GREY}
    bars = [
        (
            int(event["tid"]),
            (event["ts"] - begin) / 1e3,
            (event["ts"] + event["dur"] - begin) / 1e3,
            colours[event["cat"]],
            event["name"].rpartition("F")[2] if event["cat"] == "F" else "",
        )
        for event in events
    ]

    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        _rows(axes, ["stage 0", "stage 1"])
        _draw_bars(axes, bars, (end - begin) / 1e3 * (0.5 if narrow else 1.0), narrow)
        axes.set_xlabel("milliseconds")
        words = {"forward (and updates)": Ink.BLUE, "last update": Ink.TEAL, "receive, send": Ink.GREY}
        _legend(figure, words, columns=2 if narrow else 3)

    return draw(
        "trace",
        title="What two processes did",
        description=f"micro-batches {first} to {last} of SmallConv on two cores, from the file that --trace writes",
        plot=plot,
        wide_height=2.5,
        narrow_height=2.9,
    )


PICTURES: Final[Sequence[Callable[[], Picture]]] = (pipelines, seams, queues, memory, layers, traced)


def _bars(timeline: Timeline, colours: dict[ActionKind, Ink]) -> list[Bar]:
    return [
        (stage, start, end, colours[action.kind], str(action.microbatch))
        for stage, action, start, end in timeline.spans
        if action.kind in colours
    ]


def _slots(edge: Edge) -> tuple[list[float], list[int]]:
    """The receiver's slots that are taken, from each moment at which that changes."""
    changes = sorted([(time, 1) for time in edge.started] + [(time, -1) for time in edge.released])
    times, taken = [0.0], [0]
    for time, change in changes:
        if time == times[-1]:
            taken[-1] += change
        else:
            times.append(time)
            taken.append(taken[-1] + change)
    return times, taken


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, color=Ink.TEXT)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_bars(axes: "Axes", bars: Sequence[Bar], window: float, narrow: bool) -> None:
    axes.set_xlim(0, window)
    axes.xaxis.get_major_locator().set_params(integer=True)
    seen = [(row, max(start, 0.0), min(end, window), *look) for row, start, end, *look in bars]
    seen = [bar for bar in seen if bar[2] > bar[1]]
    for row, colour in sorted({(row, colour) for row, _, _, colour, _ in seen}):
        thin = colour is Ink.GREY
        height = 0.16 if thin else 0.72
        axes.broken_barh(
            [(start, end - start) for r, start, end, c, _ in seen if (r, c) == (row, colour)],
            (row - height / 2, height),
            facecolors=colour,
            edgecolors="none" if thin else Ink.SURFACE,
            linewidth=0.7,
        )
    character = window * (0.02 if narrow else 0.0112)
    for row, start, end, colour, text in seen:
        if text and end - start > character * len(text) and colour is not Ink.GREY:
            axes.text((start + end) / 2, row, text, ha="center", va="center_baseline", color=Ink.ON_COLOUR, size=9)


def _legend(figure: "Figure", words: dict[str, Ink], *, columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=word) for word, colour in words.items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def files(picture: Callable[[], Picture]) -> dict[Path, str]:
    """The files of a picture, and what belongs into them."""
    name, drawn = picture.__name__, picture()
    return {
        IMAGES / f"{name}.svg": _standing_alone(drawn.wide),
        IMAGES / f"{name}-narrow.svg": _standing_alone(drawn.narrow),
    }


def _standing_alone(svg: str) -> str:
    """With a name space, and with colours of its own for light and dark, which are the comparison's page's."""
    css = (ROOT / "comparison" / "report" / "page.css").read_text()
    light, dark = (re.sub(r"\s+", " ", "".join(re.findall(r"--[^;]+;", part))) for part in css.split("}")[:2])
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    head, _, rest = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    return f"{head}>{style}{rest}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is not what would be drawn")
    check: bool = parser.parse_args(arguments).check
    stale: list[Any] = []
    for picture in PICTURES:
        for path, content in files(picture).items():
            if path.exists() and path.read_text() == content:
                continue
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(content)
    print(*([f"{'differs' if check else 'wrote'}: {path}" for path in stale] or ["all as drawn"]), sep="\n")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
