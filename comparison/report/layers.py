"""Which layer has learned what: every layer's own test accuracy along the network, a line per run or rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from unlocked.comparison.report.figures import Ink, Picture, draw, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CAPTION", "LayerAccuracies", "layers_charts", "plot_layers"]

CAPTION: Final = (
    "Each layer's own prediction of the test data after the last epoch, the output layer's at the right; dotted, the "
    "same after the first epoch. Where a line no longer rises, the layers behind add nothing to what was there."
)
_INKS: Final = (Ink.BLUE, Ink.ORANGE, Ink.TEAL, Ink.PURPLE, Ink.PINK, Ink.AMBER, Ink.GREY)
_DASHES: Final = ("-", "--", "-.")
_MARKERS: Final = "os^Dv"
_MOST_NAMES = 12


@dataclass(frozen=True, kw_only=True)
class LayerAccuracies:
    """Percent by layer, in network order, the output layer last; after the last epoch, and after the first if that
    is another."""

    last: Mapping[str, float]
    first: Mapping[str, float] | None = None


def layers_charts(found: Mapping[str, LayerAccuracies], key: str) -> list[Picture]:
    """A picture for every network that there are accuracies of: lines of runs with the same layers stand together.

    Args:
        found: by what the line is called. Those with fewer than two layers that predict are left out.
        key: begins the pictures' names.
    """
    networks: dict[tuple[str, ...], dict[str, LayerAccuracies]] = {}
    for name, one in found.items():
        networks.setdefault(_network(one), {})[name] = one
    return [
        _picture(lines, f"{key}-layers{number or ''}")
        for number, lines in enumerate(lines for layers, lines in networks.items() if len(layers) > 1)
    ]


def _network(one: LayerAccuracies) -> tuple[str, ...]:
    return tuple(one.last)


def _picture(lines: Mapping[str, LayerAccuracies], name: str) -> Picture:
    def plot(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        plot_layers(axes, lines, [ink.value for ink in _INKS], most_names=_MOST_NAMES // 2 if narrow else _MOST_NAMES)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2 if narrow else 4)

    return draw(
        name,
        title="Which layer has learned what",
        description="; ".join(f"{run}: {_told(one.last)}" for run, one in lines.items()),
        plot=plot,
        wide_height=3.6 + 0.24 * -(-len(lines) // 4),
        narrow_height=3.6 + 0.26 * -(-len(lines) // 2),
    )


def plot_layers(
    axes: "Axes", lines: Mapping[str, LayerAccuracies], colours: Sequence[str], most_names: int = _MOST_NAMES
) -> None:
    """Draws lines of one network's layers."""
    layers = list(_network(next(iter(lines.values()))))
    for number, (name, one) in enumerate(lines.items()):
        colour, turn = colours[number % len(colours)], number // len(colours)
        dash, marker = _DASHES[turn % len(_DASHES)], _MARKERS[turn % len(_MARKERS)]
        if one.first is not None and tuple(one.first) == tuple(layers):
            axes.plot(range(len(layers)), list(one.first.values()), ":", color=colour, linewidth=1.2, alpha=0.7)
        axes.plot(
            range(len(layers)),
            list(one.last.values()),
            dash,
            color=colour,
            marker=marker,
            markersize=5,
            label=plain_label(name),
        )
    step = -(-len(layers) // most_names)
    shown = range(len(layers) - 1, -1, -step)  # the output layer's name always stands there
    axes.set_xticks(list(shown), [plain_label(layers[place]) for place in shown])
    axes.set_xlabel("layer")
    axes.set_ylabel("test accuracy, %")


def _told(accuracies: Mapping[str, float]) -> str:
    return ", ".join(f"{layer} {value:.1f} %" for layer, value in accuracies.items())
