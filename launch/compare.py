"""Compares local learning with backpropagation on this machine: `python launch/compare.py`, or `--study NAME`."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unlocked.launch.output import lasting_output

if TYPE_CHECKING:
    import argparse

    from unlocked.comparison.results import Report

__all__ = ["STUDIES", "main", "make_parser"]

STUDIES = {
    "memory": "unlocked.comparison.memory.study",
    "stages": "unlocked.comparison.stages.study",
}
"""Name -> module with a `main(arguments: list[str]) -> int`, which gets the command line without `--study NAME`."""


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, and turns a user's mistake into one line and exit code 2. 1: no contender could be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        study, rest = _take_study(given)
        if study is not None:
            return int(importlib.import_module(STUDIES[study]).main(rest))
        return _compare(rest)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr, flush=True)
        return 130


def make_parser() -> "argparse.ArgumentParser":
    """All flags of the comparison; its studies have others."""
    from unlocked.comparison.command_line import make_parser as comparison

    parser = comparison()
    parser.add_argument("--study", choices=list(STUDIES), help="measure this instead")
    return parser


def _compare(arguments: Sequence[str]) -> int:
    from unlocked.comparison.command_line import parse
    from unlocked.comparison.measure import measure
    from unlocked.comparison.report.table import print_report
    from unlocked.runtime.metrics.tensorboard import require_tensorboard

    options = parse(arguments)
    if options.tensorboard is not None:
        require_tensorboard()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {options.output} can't be made ({error}); give a folder of yours") from error
    report = measure(options, lambda line: print(line, flush=True))
    written = _write(report, options.output)
    if options.tensorboard is not None:
        from unlocked.comparison.report.board import write_board

        write_board(report, options.tensorboard)
        written.append(options.tensorboard)
    print_report(report)
    print("written: " + ", ".join(map(str, written)), flush=True)
    return 0 if report.measured else 1


def _write(report: "Report", folder: Path) -> list[Path]:
    """All files of the report; their paths."""
    from unlocked.comparison.report.export import write_epochs_csv, write_runs_csv
    from unlocked.runtime.saving.whole_file import write_whole

    files = [folder / name for name in ("report.json", "runs.csv", "epochs.csv")]
    write_whole(files[0], report.to_json())
    write_runs_csv(report, files[1])
    write_epochs_csv(report, files[2])
    page = folder / "report.html"
    try:
        _write_page(report, page)
    except ValueError as error:  # its plotting library is an extra
        print(f"no page: {error}", file=sys.stderr, flush=True)
    else:
        files.append(page)
    return files


def _write_page(report: "Report", path: Path) -> None:
    """With a section for each study whose result lies in the same folder."""
    from unlocked.comparison.report.figures import require_plotting
    from unlocked.comparison.report.page import write_page

    require_plotting()
    from unlocked.comparison.memory.page import memory_section
    from unlocked.comparison.memory.results import MemoryStudy
    from unlocked.comparison.stages.page import stages_section
    from unlocked.comparison.stages.results import StagesStudy

    memory, stages = path.parent / "memory.json", path.parent / "stages.json"
    sections = [memory_section(MemoryStudy.load(memory))] if memory.exists() else []
    if stages.exists():
        sections.append(stages_section(StagesStudy.load(stages)))
    write_page(report, path, studies=sections)


def _take_study(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--study`, and what is left without it."""
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag != "--study":
            continue
        taken = 1 if equals else 2
        name = value if equals else "".join(arguments[index + 1 : index + 2])
        if name not in STUDIES:
            raise ValueError(f"study {name!r} is not known; valid: {', '.join(STUDIES)}")
        return name, arguments[:index] + arguments[index + taken :]
    return None, arguments


if __name__ == "__main__":
    sys.exit(main())
