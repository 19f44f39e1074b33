"""Checks a rule of one's own: `unlocked check-rule my_rule.py`.

Is it local, deterministic, exact on every engine, resumable, and what does it cost? Exit code 0: all of it holds; 1:
some of it does not; 2: there is no such rule.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlocked.launch.output import lasting_output
from unlocked.launch.own_workers import start_workers
from unlocked.rules import LOCAL_RULES, LocalRule, Rule, get_rule
from unlocked.runtime.conformance import check_conformance, train_small
from unlocked.runtime.fields import LineParser
from unlocked.runtime.saving.whole_file import write_json

__all__ = ["find_rule", "main", "make_parser"]

_MODULE = "unlocked.launch.check_rule"


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for every property."""
    try:
        given = make_parser().parse_args(arguments)
        rule = find_rule(given.rule, given.name)
        if given.digest is not None:
            return _work(rule, given.digest)
        return _check(rule, given)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2


def find_rule(place: str, name: str | None) -> Rule:
    """The rule in a file, or one of the library's by its name.

    Args:
        name: of the class, or of what makes a rule; None: the file's only LocalRule class.

    Raises:
        ValueError: there is none, or there are several; lists them.
    """
    if place in LOCAL_RULES:
        return get_rule(place, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{place} is neither a file nor a rule of the library; those are {', '.join(LOCAL_RULES)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{place} is no Python file; give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{place} can't be imported: {type(error).__name__}: {error}") from error
    here = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, LocalRule) and value.__module__ == module.__name__
    }
    if name is not None:
        found: Any = getattr(module, name, None)
        if found is None:
            raise ValueError(f"{place} has no {name}; its rules are {', '.join(here) or 'none'}")
        return found
    if len(here) != 1:
        raise ValueError(f"{place} has the rules {', '.join(here) or 'none'}; say which: check-rule {place} NAME")
    return next(iter(here.values()))


def _check(rule: Rule, given: argparse.Namespace) -> int:
    def in_processes(count: int) -> str:
        with tempfile.TemporaryDirectory(prefix="unlocked-") as folder:
            out = Path(folder) / "digest.json"
            told = [given.rule, *([given.name] if given.name else []), "--digest", str(out)]
            if start_workers(count, _MODULE, told, threads=1):
                return "none"
            return str(json.loads(out.read_text())["weights_sha256"])

    failed = 0
    for check in check_conformance(rule, processes=None if given.no_processes else in_processes):
        print(f"{'ok' if check.passed else 'FAILED':<8}{check.name}: {check.seen}", flush=True)
        failed += not check.passed
    return 1 if failed else 0


def _work(rule: Rule, out: Path) -> int:
    """A worker of a pipeline, under a launcher."""
    result = train_small(rule, "processes")
    if os.environ.get("RANK", "0") == "0":
        write_json(out, {"weights_sha256": result.weights_sha256})
    return 0


def make_parser() -> LineParser:
    parser = LineParser(
        prog="unlocked check-rule",
        description="Is a rule local, deterministic, exact on every engine, resumable; and what does it cost?",
    )
    parser.add_argument("rule", help="a Python file with a LocalRule class, or the name of a rule of the library")
    parser.add_argument("name", nargs="?", help="of the class, where the file has several")
    parser.add_argument("--no-processes", action="store_true", help="leave out the runs in several processes")
    parser.add_argument("--digest", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
