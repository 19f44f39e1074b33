"""Pictures for a page that reads on a phone and in the dark: matplotlib's SVG, its colours left to the page.

A chart is drawn twice, wide and narrow, and the page shows the one that fits. Text stays text. What is drawn in one of
`Ink`'s colours comes out as a CSS variable, so that the page's colour scheme decides.
"""

import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FAMILY_COLOURS", "Ink", "Picture", "draw", "plain_label", "require_plotting"]

_WIDE, _NARROW = 10.0, 4.75  # inches; the page shows them at about 860 and 350 pixels
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"


class Ink(StrEnum):
    """The colours of a chart, as matplotlib is told them; the page's stylesheet knows them by their names."""

    TEXT = "#000001"
    MUTED = "#000002"
    GRID = "#000003"
    SURFACE = "#000004"
    ON_COLOUR = "#000005"
    """Text upon one of the colours below."""
    BLUE = "#000011"
    ORANGE = "#000012"
    TEAL = "#000013"
    PURPLE = "#000014"
    GREY = "#000015"
    AMBER = "#000016"
    PINK = "#000017"

    @property
    def css(self) -> str:
        return f"var(--{self.name.lower().replace('_', '-')})"


FAMILY_COLOURS: Final = {"BP": Ink.ORANGE, "LLS": Ink.BLUE, "LLS_M": Ink.TEAL, "LLS_MxM": Ink.PURPLE}
"""Of a contender, by what it minimises: the same in every chart."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A chart for the page.

    Attributes:
        title: what it shows, in a few words.
        description: what can be seen in it, for those who can't see it.
        wide, narrow: SVG elements.
    """

    title: str
    description: str
    wide: str
    narrow: str


def require_plotting() -> None:
    """Raises: ValueError where the libraries that draw the page are not installed."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the page needs {' and '.join(missing)}, which is not installed; pip install 'unlocked[report]'"
        )


def draw(
    name: str,
    *,
    title: str,
    description: str,
    plot: "Callable[[Figure, bool], None]",
    wide_height: float,
    narrow_height: float,
) -> Picture:
    """Draws a chart twice.

    Args:
        name: unique on the page; begins every id inside.
        plot: draws on an empty figure; told whether it is the narrow one.
        wide_height, narrow_height: in inches, for widths of 10 and 4.75.
    """
    import matplotlib
    from matplotlib.figure import Figure

    svg = []
    for narrow, width, height in ((False, _WIDE, wide_height), (True, _NARROW, narrow_height)):
        style: Any = _style(narrow)  # older and newer releases declare it differently
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(width, height), layout="constrained")
            plot(figure, narrow)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True)
        svg.append(_for_page(buffer.getvalue(), f"{name}-{'narrow' if narrow else 'wide'}", title, description))
    return Picture(title=title, description=description, wide=svg[0], narrow=svg[1])


def plain_label(name: str) -> str:
    """`name` as a label that Matplotlib neither takes for a formula nor, for its underscore, leaves out."""
    plain = name.replace("$", r"\$")
    return f"\u200b{plain}" if plain.startswith("_") else plain


def _style(narrow: bool) -> dict[str, Any]:
    size = 11.5 if narrow else 11.0
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "unlocked",  # the same picture for the same numbers
        "font.family": "DejaVu Sans",  # ships with matplotlib, and wider than what the page uses: nothing overflows
        "font.size": size,
        "axes.titlesize": size,
        "axes.titlelocation": "left",
        "axes.labelsize": size,
        "legend.fontsize": size,
        "xtick.labelsize": size,
        "ytick.labelsize": size,
        "text.color": Ink.TEXT.value,
        "axes.edgecolor": Ink.GRID.value,
        "axes.labelcolor": Ink.MUTED.value,
        "axes.titlecolor": Ink.TEXT.value,
        "xtick.color": Ink.GRID.value,
        "ytick.color": Ink.GRID.value,
        "xtick.labelcolor": Ink.MUTED.value,
        "ytick.labelcolor": Ink.MUTED.value,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": Ink.GRID.value,
        "grid.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.linewidth": 2.2,
        "path.simplify": True,
    }


def _for_page(svg: str, name: str, title: str, description: str) -> str:
    """One inline element: no prologue, no metadata, no id twice on a page, colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for ink in Ink:
        svg = svg.replace(ink.value, ink.css)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", _FONT, svg)
    head, _, rest = svg.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None, "matplotlib's SVG has a viewBox"
    label = f"{_escape(title)}: {_escape(description)}"
    return f'<svg {view[0]} role="img" aria-label="{label}">{rest}'.strip()


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
