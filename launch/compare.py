"""Compares local learning with backpropagation on this machine: `python launch/compare.py`, or `--study NAME`."""

import importlib
import sys
from collections.abc import Sequence

__all__ = ["STUDIES", "main"]

STUDIES = {
    "memory": "unlocked.launch.comparison.memory_study",
    "stages": "unlocked.launch.comparison.stages_study",
}
"""Name -> module with a `main(arguments: list[str]) -> int`, which gets the command line without `--study NAME`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, and turns a user's mistake into one line and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        study, rest = _take_study(given)
        if study is not None:
            return int(importlib.import_module(STUDIES[study]).main(rest))
        raise ValueError("give --study NAME")
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


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
