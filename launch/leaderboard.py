"""Rules beside each other under one budget: `unlocked leaderboard`, or `python -m unlocked.launch.leaderboard`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unlocked.launch.output import lasting_output

if TYPE_CHECKING:
    from unlocked.runtime.fields import LineParser

__all__ = ["main", "make_parser"]


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, measures, and writes the page. 2: a user's mistake; 1: no cell could be trained; 130: interrupted, and
    the same command goes on."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where this one was", file=sys.stderr, flush=True)
        return 130


def make_parser() -> "LineParser":
    """All flags of the command."""
    from unlocked.comparison.leaderboard.options import make_parser as leaderboard

    return leaderboard()


def _run(given: Sequence[str]) -> int:
    from unlocked.comparison.leaderboard.board import read_board
    from unlocked.comparison.leaderboard.options import parse
    from unlocked.comparison.leaderboard.page import summary_line, write_tables
    from unlocked.comparison.leaderboard.session import Session

    options = parse(given)
    if not options.report_only:
        if options.retry:
            with Session(options, print) as session:
                session.forget_failed()
        if options.jobs > 1 and (code := _share_out(given, options.jobs)):
            return code
        with Session(options, lambda line: print(line, flush=True)) as session:
            session.train()
            if not options.train_only:
                session.measure()
    if options.train_only:
        return 0
    board = read_board(options)
    if not any(table.trained for table in board.tables):
        print("error: no cell has been trained, or all have failed", file=sys.stderr, flush=True)
        return 1
    written = write_tables(board, options.output)
    try:
        from unlocked.comparison.leaderboard.page import write_page

        write_page(board, options, options.output / "leaderboard.html")
        written.append(options.output / "leaderboard.html")
    except ValueError as error:  # its plotting library is an extra
        print(f"no page: {error}", file=sys.stderr, flush=True)
    for table in board.tables:
        print(summary_line(table))
    if board.missing:
        print(f"{board.missing} cells are not there yet; the same command trains them")
    print("written: " + ", ".join(map(str, written)), flush=True)
    return 0


def _share_out(given: Sequence[str], jobs: int) -> int:
    """Trains in so many processes that take cells in turn; the worst of their exit codes."""
    told = [word for word in given if word != "--retry"]  # once for all of them: what fails now has had its try
    command = [sys.executable, "-m", "unlocked.launch.leaderboard", *told, "--jobs", "1", "--train-only"]
    running = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(jobs)]
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main())
