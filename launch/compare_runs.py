"""Saved runs beside each other: `unlocked compare-runs DIR...`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unlocked.launch.output import lasting_output
from unlocked.runtime.fields import LineParser, add_flags, check, setting
from unlocked.runtime.paths import checked_path

if TYPE_CHECKING:
    from rich.table import Table

    from unlocked.comparison.saved_runs import SavedTable

__all__ = ["RunsOptions", "main", "make_parser"]


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """What becomes of the runs."""

    output: Path | None = setting(
        None, "write them here as well: table and curves (.html, .png), or the table (.csv)", place="new file"
    )

    def __post_init__(self) -> None:
        check(self)


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the runs' table. A mistake ends in one line on standard error and exit code 2."""
    try:
        given = vars(make_parser().parse_args(arguments))
        paths = [checked_path("run", path, "") for path in given.pop("runs")]
        return _compare(paths, RunsOptions(**given))
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2


def make_parser() -> LineParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked compare-runs",
        usage="unlocked compare-runs DIR... [FLAGS]",
        description="Shows saved runs beside each other: the settings that tell them apart, and how they ended.",
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="a run's folder, or a folder that holds runs")
    add_flags(parser.add_argument_group("what is written"), RunsOptions)
    return parser


def _compare(paths: Sequence[Path], options: RunsOptions) -> int:
    from rich.console import Console

    from unlocked.comparison.saved_runs import find_saved_runs, table_of

    runs, problems = find_saved_runs(paths)
    for problem in problems:
        print(f"warning: {' '.join(problem.split())}", file=sys.stderr, flush=True)
    if options.output is not None:
        from unlocked.comparison.runs_page import write_runs

        write_runs(runs, options.output)
    told, console = table_of(runs), Console()
    for columns in _parts(told, console.width):
        console.print(_shown(told, columns))
    if options.output is not None:
        print(f"written: {options.output}", flush=True)
    return 0


def _parts(told: "SavedTable", width: int) -> list[list[int]]:
    """The columns beside the names, in as many tables as it takes for none to be wider than `width` characters."""
    room = width - max(_NAME, min(_width(told, 0), width // 3)) - 3
    parts: list[list[int]] = [[]]
    left = room
    for column in range(1, len(told.head)):
        needed = _width(told, column) + 3  # a blank on either side, and one between columns
        if needed > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= needed
    return parts


def _width(told: "SavedTable", column: int) -> int:
    """Characters that a column needs; its head may be broken between words."""
    return max(map(len, (*told.head[column].split(), *(row[column] for row in told.rows))))


def _shown(told: "SavedTable", columns: Sequence[int]) -> "Table":
    """The runs' names, and these columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    table.add_column(told.head[0], overflow="fold", min_width=_NAME)
    for column in columns:
        table.add_column(told.head[column], justify="right", min_width=_width(told, column))
    for row in told.rows:
        table.add_row(Text(row[0]), *(Text(row[column]) for column in columns))  # a name in brackets is no markup
    return table


_NAME = 12  # characters of a run's name in a line, at least


if __name__ == "__main__":
    sys.exit(main())
