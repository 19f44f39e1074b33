"""`unlocked completion bash|zsh|tcsh`: prints what makes a shell complete commands, flags, names and files."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from unlocked.launch.output import lasting_output
from unlocked.runtime.fields import LineParser, choices_of, setting_names

__all__ = ["SHELLS", "main", "make_parser"]

SHELLS = ("bash", "zsh", "tcsh")
_WHERE = """For this session:  eval "$(unlocked completion bash)"
For good, into ~/.local/share/bash-completion/completions/unlocked;
of zsh, into a file _unlocked in a folder of $fpath."""

_ONE_OF = {"rules": "training_mode", "models": "model", "datasets": "dataset"}
"""Flags that take several of what a training takes one of."""


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the script. 2: no such shell, in one line."""
    try:
        shell = make_parser().parse_args(arguments).shell
        if shell not in SHELLS:
            raise ValueError(f"shell {shell!r} is not known; valid: {', '.join(SHELLS)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    import shtab

    print(shtab.complete(_all_commands(), shell=shell))
    return 0


def make_parser() -> LineParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked completion",
        description="Prints a script by which a shell completes commands, flags, names and files.",
        epilog=_WHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))
    return parser


def _all_commands() -> argparse.ArgumentParser:
    """One parser that has those of all commands that have one."""
    from unlocked.launch.console import COMMANDS

    root = argparse.ArgumentParser(prog="unlocked")
    commands = root.add_subparsers(dest="command")
    for name, (module, what) in COMMANDS.items():
        make = getattr(importlib.import_module(module), "make_parser", None)
        parents = [] if make is None else [make()]
        command = commands.add_parser(name, help=what, description=what, parents=parents, add_help=make is None)
        for action in command._actions:
            _tell_values(action, name)
    return root


def _tell_values(action: argparse.Action, command: str) -> None:
    """What may stand after a flag: files, folders, or the names that its setting knows."""
    import shtab

    from unlocked.runtime.recipe import Recipe

    if action.metavar in ("FILE", "DIR"):
        action.complete = getattr(shtab, {"FILE": "FILE", "DIR": "DIRECTORY"}[str(action.metavar)])  # type: ignore[attr-defined]
    elif command == "completion" and action.dest == "shell":
        action.choices = SHELLS
    elif (name := _ONE_OF.get(action.dest, action.dest)) in setting_names(Recipe):
        action.choices = tuple(filter(None, choices_of(Recipe, name))) or None


if __name__ == "__main__":
    sys.exit(main())
