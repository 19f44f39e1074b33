"""How figures look in a notebook: a small card of HTML, curves as inline SVG. Nothing is fetched, nothing runs."""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite

__all__ = ["card", "curves", "grid"]

_WIDTH, _HEIGHT = 260, 120  # of a picture, in CSS pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 22, 20
_DASHES = ("", "4 3")  # lines are told apart without colour as well
_COLOURS = ("#2a6fb0", "#c2571a")
_CELL = "padding:2px 8px;border:none;text-align:left"
_NUMBER = "padding:1px 6px;border:none;text-align:right"


def card(title: str, lines: Sequence[tuple[str, str]], pictures: Sequence[str] = ()) -> str:
    """A title, (name, text) lines as a table, and pictures beside each other; reads well on light and on dark."""
    rows = "".join(
        f'<tr><th scope="row" style="{_CELL};font-weight:normal;opacity:.7">{escape(name)}</th>'
        f'<td style="{_CELL}">{escape(text)}</td></tr>'
        for name, text in lines
    )
    return (
        f'<div style="font-family:system-ui,sans-serif;font-size:13px"><strong>{escape(title)}</strong>'
        f'<table style="border-collapse:collapse;margin:4px 0">{rows}</table>'
        f'<div style="display:flex;flex-wrap:wrap;gap:12px">{"".join(pictures)}</div></div>'
    )


def curves(title: str, series: Mapping[str, Sequence[float | None]], first: int = 1) -> str:
    """One picture: a line for each series over the epochs `first`, `first` + 1, ...; values that are not finite, or
    None, are left out."""
    points = {
        name: [(n, value) for n, value in enumerate(values) if value is not None and isfinite(value)]
        for name, values in series.items()
    }
    points = {name: found for name, found in points.items() if found}
    values = [value for found in points.values() for _, value in found]
    if not values:
        return ""
    low, high = min(values), max(values)
    last = max(n for found in points.values() for n, _ in found)
    span = high - low or 1.0
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(n: int, value: float) -> tuple[float, float]:
        return _LEFT + wide * (n / last if last else 0.5), _TOP + tall * (1 - (value - low) / span)

    parts = [_text(_LEFT, 12, title, "start")]
    for value in (low, high):
        parts.append(_text(_LEFT - 4, place(0, value)[1] + 4, f"{value:.4g}", "end"))
    parts += [_text(place(n, low)[0], _HEIGHT - 4, str(first + n), "middle") for n in {0, last}]
    for number, (name, found) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(n, value) for n, value in found))
        dash = f' stroke-dasharray="{_DASHES[number % len(_DASHES)]}"' if _DASHES[number % len(_DASHES)] else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        x, y = place(*found[-1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>')
        legend = f'<tspan fill="{colour}">{escape(name)}</tspan>'
        parts.append(
            f'<text x="{_WIDTH - _RIGHT - 64 * number}" y="12" text-anchor="end" font-size="11">{legend}</text>'
        )
    return (
        f'<svg role="img" aria-label="{escape(title)} by epoch" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="color:inherit">{"".join(parts)}</svg>'
    )


def grid(title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A table of counts with the same names on both sides; the diagonal in bold."""
    head = "".join(f'<th scope="col" style="{_NUMBER}">{escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row" style="{_NUMBER}">{escape(name)}</th>'
        f"{''.join(_count(count, column == row) for column, count in enumerate(line))}</tr>"
        for row, (name, line) in enumerate(zip(names, counts, strict=True))
    )
    return (
        f'<table style="border-collapse:collapse;font-size:12px"><caption style="text-align:left;opacity:.7">'
        f"{escape(title)}</caption><tr><th></th>{head}</tr>{rows}</table>"
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "currentColor") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="11" fill="{colour}">{escape(text)}</text>'


def _count(count: int, on_diagonal: bool) -> str:
    emphasis = ";font-weight:bold" if on_diagonal else ";opacity:.45" if not count else ""
    return f'<td style="{_NUMBER}{emphasis}">{count}</td>'
