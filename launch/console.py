"""The command `unlocked`, also `python -m unlocked`: train, compare, evaluate and the others, without a checkout.

Each command is an entry point of its own and gets the rest of the command line; nothing of torch is imported before a
command is known.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from unlocked.launch.output import lasting_output

__all__ = ["COMMANDS", "leave", "main"]

COMMANDS = {
    "train": ("unlocked.launch.pipeline", "train a network by local rules, in one process or as a pipeline"),
    "launch": ("unlocked.launch.cluster", "the same by torchrun, on one machine or many"),
    "compare": ("unlocked.launch.compare", "local learning beside backpropagation on this machine"),
    "check-rule": ("unlocked.launch.check_rule", "is a rule of one's own local, exact and resumable"),
    "leaderboard": ("unlocked.launch.leaderboard", "rules x networks x data x seeds under one budget, on one page"),
    "explain": ("unlocked.launch.explain", "what each layer's step is made of, and what it costs"),
    "evaluate": ("unlocked.launch.evaluate", "score saved weights or a snapshot"),
    "chaos": ("unlocked.launch.chaos", "train under faults: equal bits, and at what cost"),
    "compare-runs": ("unlocked.launch.compare_runs", "saved runs beside each other: a table, and curves"),
    "completion": ("unlocked.launch.completion", "make your shell complete all of this"),
    "simulate": ("unlocked.runtime.schedules.simulate", "show a pipeline's schedule, its timeline and its bubbles"),
}
"""Name -> a module with a `main(arguments) -> int`, and what it does in one line. A `make_parser()` of that module
gives its flags, for the shell."""


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that is named first. 2: there is no such command."""
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name in ("-V", "--version"):
        # The face of the whole stands above this room, which may not import it; it is loaded already.
        print(f"unlocked {sys.modules['unlocked'].__version__}")
        return 0
    if name not in COMMANDS:
        valid = ", ".join(COMMANDS)
        print(f"error: {name!r} is no command of unlocked; give one of {valid}, or --help", file=sys.stderr, flush=True)
        return 2
    try:
        return int(importlib.import_module(COMMANDS[name][0]).main(rest))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        return 130


def leave(code: int) -> None:
    """Ends this process. Native threads of a broken process group may never end; whatever is ours is closed or lost by
    then, so that a failed worker does not wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0 or "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    os._exit(code)


def run() -> None:
    """What the installed command calls."""
    leave(main())


def _help() -> str:
    lines = [f"  {name:<14}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: unlocked COMMAND [FLAGS]   (unlocked COMMAND --help lists the flags)",
            "",
            "Trains networks by local learning rules as a pipeline, exactly as the plain loop would.",
            "",
            *lines,
            "",
            "  --version",
            "  --help",
            "",
            "For example: unlocked train --dataset digits --stages 2",
        ]
    )


if __name__ == "__main__":
    run()
