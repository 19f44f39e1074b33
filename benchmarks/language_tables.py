"""The tables of benchmarks/language.py, of the file that it adds to; they are those of docs/language_models.md."""

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["print_tables", "read_figures", "tables", "write_tables"]

BEGIN, END = "<!-- tables of benchmarks/language.py -->", "<!-- end of the tables -->"

Figures = dict[str, Any]


def read_figures(path: Path) -> Figures:
    """Raises: ValueError: there is no such file, or another one."""
    if not path.is_file():
        raise ValueError(f"{path} is not there yet; --train-only and --speed-only make it")
    try:
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
        if not {"sizes", "runs", "forms", "speed"} <= found.keys():
            raise KeyError("sizes")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no figures of language.py; give another file") from error
    return found


def print_tables(figures: Figures) -> None:
    print("\n\n".join(tables(figures)))


def write_tables(figures: Figures, page: Path) -> None:
    """Between the page's marks. Raises: ValueError: there are none."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no marks {BEGIN} and {END}; the tables stand between them")
    page.write_text("\n\n".join([before + begin, *tables(figures), end + after]), encoding="utf-8")


def tables(figures: Figures) -> list[str]:
    """In Markdown, as far as the file holds something of it: bits per byte after equal tokens; speed and memory; bits
    per byte after equal seconds."""
    runs, speed = best_rates(figures["runs"]), figures["speed"]
    found = [_accuracy(runs)] if runs else []
    if speed:
        found.append(_speed(speed))
    if runs and speed:
        found.append(_equal_seconds(runs, speed))
    return found


def best_rates(runs: list[Figures]) -> dict[str, list[Figures]]:
    """By contender, the runs of most tokens at the learning rate with the lowest mean of the bits per byte in the end;
    only rates with as many seeds as any other of that contender count."""
    found: dict[str, list[Figures]] = {}
    for contender in dict.fromkeys(run["contender"] for run in runs):
        own = [run for run in runs if run["contender"] == contender]
        longest = max(run["tokens"] for run in own)
        by_rate: dict[float, list[Figures]] = {}
        for run in own:
            if run["tokens"] == longest:
                by_rate.setdefault(run["lr"], []).append(run)
        most = max(map(len, by_rate.values()))
        full = [group for group in by_rate.values() if len(group) == most]
        found[contender] = min(full, key=lambda group: statistics.mean(_last(run) for run in group))
    return found


def at_tokens(run: Figures, tokens: float) -> float | None:
    """Bits per byte by then, linear between the evaluations; None: outside of them."""
    curve = [(point["tokens"], point["bits_per_byte"]) for point in run["curve"]]
    for (before, high), (after, low) in pairwise(curve):
        if before <= tokens <= after:
            return float(high + (low - high) * (tokens - before) / (after - before))
    return float(curve[0][1]) if curve and tokens == curve[0][0] else None


def _last(run: Figures) -> float:
    return float(run["curve"][-1]["bits_per_byte"])


def _accuracy(runs: dict[str, list[Figures]]) -> str:
    points = [point["tokens"] for point in next(iter(runs.values()))[0]["curve"]]
    head = ["rule / parts", "seeds", "lr", *(f"{tokens:,} tokens" for tokens in points), "token accuracy, %"]
    rows = []
    for contender, group in runs.items():
        columns = [[run["curve"][k]["bits_per_byte"] for run in group] for k in range(len(group[0]["curve"]))]
        accuracy = [run["curve"][-1]["acc1"] for run in group]
        cells = [*map(_spread, columns), _spread(accuracy, 1)]
        rows.append([contender, str(len(group)), f"{group[0]['lr']:g}", *cells])
    return _markdown(head, rows)


def _speed(speed: list[Figures]) -> str:
    rows = []
    for name in dict.fromkeys(one["contender"] for one in speed):
        own = [one for one in speed if one["contender"] == name]
        rates = [one["tokens_per_second"] for one in own]
        memory = [_most(own, kind) for kind in ("own_memory_bytes", "peak_memory_bytes")]
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        rows.append([name, str(len(own)), spread, *memory])
    return _markdown(["contender", "turns", "tokens/s, median", "own memory, MiB", "with libraries, MiB"], rows)


def _most(turns: list[Figures], kind: str) -> str:
    """The peak of each process over all turns."""
    return " / ".join(f"{max(stage) / 2**20:,.0f}" for stage in zip(*(one[kind] for one in turns), strict=True))


def _equal_seconds(runs: dict[str, list[Figures]], speed: list[Figures]) -> str:
    """At the seconds in which the slowest contender has read all its tokens, on an otherwise idle machine: each one's
    curve of tokens, read at its own median rate."""
    rates: dict[tuple[str, str], float] = {}
    for one in speed:
        own = [o["tokens_per_second"] for o in speed if o["contender"] == one["contender"]]
        rates[one["contender"], one["trains"]] = statistics.median(own)
    pairs = [(name, rate, runs[trains]) for (name, trains), rate in rates.items() if trains in runs]
    if not pairs:
        return "no contender has both figures yet"
    seconds = min(group[0]["tokens"] / rate for _, rate, group in pairs)
    rows = []
    for name, rate, group in pairs:
        values = [at_tokens(run, seconds * rate) for run in group]
        known = [value for value in values if value is not None]
        rows.append(
            [name, f"{seconds * rate:,.0f}", _spread(known) if len(known) == len(values) else "before the first"]
        )
    return _markdown(["contender", f"tokens in {seconds:,.0f} s", "bits per byte by then"], rows)


def _spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
