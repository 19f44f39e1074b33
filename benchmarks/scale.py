"""Pipelines of 8, 64 and 1,024 stages, on paper: throughput, failures, memory for recovery, messages.

    python benchmarks/scale.py                                # all tables; a minute
    python benchmarks/scale.py --stages 8 64 --mtbf-days 7 --forward 0.004
    python benchmarks/scale.py --links near:10e-6:12.5e9 far:20e-3:12.5e6 --json scale.json
    python benchmarks/scale.py --update docs/scale.md          # rewrites the tables between the document's marks

The numbers come from `unlocked.comparison.scale`; nothing is measured here. docs/scale.md says what they rest on.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from unlocked.comparison.environment import environment
from unlocked.comparison.scale.study import SCHEDULES, Assumptions, Link, study
from unlocked.runtime.fields import add_flags
from unlocked.runtime.saving.whole_file import write_json, write_whole
from unlocked.runtime.typed import to_plain

LINKS = ("10 us, 100 Gbit/s:10e-6:12.5e9", "100 us, 10 Gbit/s:100e-6:1.25e9", "20 ms, 1 Gbit/s:20e-3:125e6")
_MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
_MIB = float(1 << 20)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    told = vars(options)
    try:
        assumptions = Assumptions(**{one.name: told[one.name] for one in fields(Assumptions) if one.name in told})
        found = study(assumptions, options.stages, [link(text) for text in options.links], options.mtbf_days)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tables = {name: make(found) for name, make in TABLES.items()}
    if options.update is None:
        print("\n\n".join(f"{name}\n{text}" for name, text in tables.items()))
    else:
        text = options.update.read_text()
        write_whole(
            options.update, _MARK.sub(lambda at: f"<!-- table: {at[1]} -->\n{tables[at[1]]}\n<!-- end -->", text)
        )
    if options.json is not None:
        write_json(options.json, {"environment": to_plain(environment()), **found})
    return 0


def link(text: str) -> Link:
    """Raises: ValueError: it is not NAME:LATENCY:BANDWIDTH."""
    try:
        name, latency, bandwidth = text.rsplit(":", 2)
        made = Link(name, float(latency), float(bandwidth))
    except ValueError:
        raise ValueError(f"--links {text} is not NAME:LATENCY:BANDWIDTH, such as near:10e-6:12.5e9") from None
    if not (name and 0 <= made.latency < 1e6 and 0 < made.bandwidth < 1e18):
        raise ValueError(f"--links {text} has no name, or a latency [s] or bandwidth [bytes/s] that no link has")
    return made


# The tables


def throughput(found: dict[str, Any]) -> str:
    """A row for stages and link, a column for every schedule: rate and busy share."""
    keys = dict.fromkeys((row["stages"], row["link"]) for row in found["throughput"])
    rows = {(row["stages"], row["link"], row["schedule"]): row for row in found["throughput"]}
    body = [
        [f"{stages:,}", where, *(f"{row['microbatches_per_second']:.1f} ({row['busy']:.0%})" for row in of)]
        for stages, where in keys
        for of in [[rows[stages, where, name] for name in SCHEDULES]]
    ]
    return table(["stages", "link", *SCHEDULES], body)


def fill_and_drain(found: dict[str, Any]) -> str:
    body = [
        [
            f"{row['stages']:,}",
            row["schedule"],
            f"{row['fill_seconds']:.2f}",
            f"{row['drain_seconds']:.2f}",
            "every step" if row["schedule"] in ("1F1B", "ZB-H1") else "once a run",
            f"{row['kept_microbatches']:,}",
            row["weight_versions"],
        ]
        for row in found["throughput"]
        if row["link"] == found["links"][0]["name"]
    ]
    return table(["stages", "schedule", "fill, s", "drain, s", "paid", "micro-batches kept", "weights kept"], body)


def failures(found: dict[str, Any]) -> str:
    body = []
    for row in found["failures"]:
        rates = row["microbatches_per_second"]
        body.append(
            [
                f"{row['stages']:,}",
                f"{row['mtbf_days']:g}",
                duration(3600 * row["hours_between_failures"]),
                duration(row["save_every_seconds"]),
                f"{row['all_go_back']:.1%}",
                f"{row['stage_goes_back']:.1%}",
                *(f"{rates[name]:.1f}" for name in ("local, stage alone", *SCHEDULES)),
            ]
        )
    head = ["stages", "MTBF, days", "a failure every", "all saved every", "ETTR, all go back", "ETTR, stage alone"]
    return table([*head, "local, stage alone", *SCHEDULES], body)


def memory(found: dict[str, Any]) -> str:
    body = [
        [
            f"{row['stages']:,}",
            row["link"],
            f"{row['used_bytes_per_edge'] / _MIB:,.0f}",
            f"{row['bytes_per_edge'] / _MIB:,.0f}",
            f"{row['bytes'] / _MIB / 1024:,.1f}",
            duration(row["covers_seconds"]),
            duration(row["own_save_every_seconds"]),
        ]
        for row in found["memory"]
    ]
    head = [
        "stages",
        "link",
        "used of an edge's log, MiB",
        "its room, MiB",
        "of all, GiB",
        "room lasts",
        "a stage saves",
    ]
    return table(head, body)


def coordinator(found: dict[str, Any]) -> str:
    body = [
        [
            f"{row['stages']:,}",
            f"{row['heard']:,.0f}",
            f"{row['said']:,.0f}",
            f"{row['heard_bytes'] / 1e3:,.0f}",
            f"{row['said_bytes'] / 1e3:,.0f}",
            f"{row['bytes_per_day'] / 1e9:,.1f}",
            f"{row['epoch_messages']:,}",
            f"{row['epoch_bytes'] / 1e3:,.0f}",
        ]
        for row in found["coordinator"]
    ]
    head = ["stages", "heard/s", "said/s", "heard, kB/s", "said, kB/s", "GB a day", "an epoch's messages", "its kB"]
    return table(head, body)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "throughput": throughput,
    "fill-and-drain": fill_and_drain,
    "failures": failures,
    "memory": memory,
    "coordinator": coordinator,
}


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--links", nargs="+", default=LINKS, metavar="NAME:LATENCY:BANDWIDTH", help="[s], [bytes/s]")
    parser.add_argument("--mtbf-days", type=float, nargs="+", default=[365.0, 30.0, 1.0], help="of a node")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite this document's tables")
    add_flags(parser.add_argument_group("what is put in"), Assumptions)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
