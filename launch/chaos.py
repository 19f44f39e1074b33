"""A training under faults: `unlocked chaos --stages 2 FLAGS`, with the training's flags beside those of the faults."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from unlocked.launch.output import lasting_output

if TYPE_CHECKING:
    from unlocked.comparison.chaos.options import ChaosOptions
    from unlocked.comparison.chaos.records import Campaign
    from unlocked.runtime.fields import LineParser
    from unlocked.runtime.recipe import Recipe

__all__ = ["main", "make_parser", "parse"]

_USUAL = ["--snapshot-every", "10", "--print-freq", "5", "--timeout", "8", "--start-timeout", "45"]
_USUAL += ["--max-recoveries", "100000", "--keep-snapshots", "3"]
"""Of the training, where nothing else is told: little is lost, progress shows, and who stands still counts as lost
after 4 seconds, in set-up after 45; one run may take many faults; and no disk is filled with hundreds of snapshots."""
_OURS = ("save_path", "experiment_name", "summary", "resume", "plain")


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the training undisturbed and under faults. 0: all came to the same bits, nothing hung and every cause was
    named; 1: something was not so; 2: a mistake."""
    from unlocked.comparison.chaos.campaign import new_campaign, run_campaign
    from unlocked.comparison.chaos.records import format_table
    from unlocked.comparison.chaos.report import join, read_report, update_report

    def keep() -> "list[Campaign]":
        return [campaign] if options.report is None else update_report(options.report, campaign)

    try:
        options, recipe, rest = parse(sys.argv[1:] if arguments is None else arguments)
        plan = recipe.plan(*recipe.load_data())
        command = [sys.executable, "-m", "unlocked.launch.pipeline", *_USUAL, *rest]
        begun = [] if options.report is None else read_report(options.report)
        campaign = join(begun, new_campaign(command, _stages(recipe), options))
        with _stopped_in_order():
            run_campaign(
                command,
                plan,
                options,
                campaign,
                start_timeout=getattr(recipe.engine, "start_timeout", 0.0),
                root=recipe.save_path,
                say=lambda line: print(line, flush=True),
                keep=keep,
            )
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted before the first fault", file=sys.stderr, flush=True)
        return 130
    print(format_table(keep()))
    for problem in campaign.problems:
        print(f"problem: {problem}")
    return 130 if campaign.is_interrupted else 1 if campaign.problems else 0


@contextlib.contextmanager
def _stopped_in_order() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does: the trainings, which have sessions of their own, must not outlive this process."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(arguments: Sequence[str]) -> "tuple[ChaosOptions, Recipe, list[str]]":
    """The faults' options, the training's, and the command line that is left for the training.

    Raises:
        ValueError: a mistake, in one line.
    """
    from unlocked.comparison.chaos.options import ChaosOptions
    from unlocked.launch.command_line import parse as parse_training
    from unlocked.runtime import Processes
    from unlocked.runtime.engines.pipeline import AUTO

    given, rest = _own_parser().parse_known_args(arguments)
    options = ChaosOptions(**vars(given))
    recipe = parse_training(rest, default_engine="processes")
    if not isinstance(recipe.engine, Processes) or recipe.engine.stages in (None, AUTO):
        raise ValueError("faults are for a pipeline of processes on this machine; give --stages N")
    recipe = parse_training([*_USUAL, *rest], default_engine="processes")
    taken = [name for name in _OURS if name != "save_path" and _is_given(rest, name)]
    if taken:
        raise ValueError(f"--{taken[0].replace('_', '-')} is set for every run by itself; leave it out")
    return options, recipe, _without(rest, "--save-path")


def make_parser() -> "LineParser":
    """All flags of the command: those of the faults, and the training's."""
    from unlocked.launch.command_line import make_parser as training

    parser = _own_parser()
    taken = {f"--{name.replace('_', '-')}" for name in _OURS if name != "save_path"} | {"--help"}
    for group in training()._action_groups:
        own = parser.add_argument_group(group.title, group.description)
        for action in group._group_actions:
            if not taken & set(action.option_strings):
                own._add_action(action)
    return parser


def _own_parser() -> "LineParser":
    from unlocked.comparison.chaos.options import ChaosOptions
    from unlocked.runtime.fields import LineParser, add_flags

    parser = LineParser(
        prog="unlocked chaos",
        description="Runs a training under faults, again and again by --resume auto, and compares it with the "
        "undisturbed run. Takes the flags of unlocked train as well; --stages tells the number of processes.",
        allow_abbrev=False,
    )
    add_flags(parser.add_argument_group("faults"), ChaosOptions)
    return parser


def _is_given(rest: Sequence[str], name: str) -> bool:
    flag = f"--{name.replace('_', '-')}"
    return any(word == flag or word.startswith(f"{flag}=") for word in rest)


def _without(rest: Sequence[str], flag: str) -> list[str]:
    """The command line without a flag and its value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag)
    return parser.parse_known_args(rest)[1]


def _stages(recipe: "Recipe") -> int:
    stages = getattr(recipe.engine, "stages", 1)
    return stages if isinstance(stages, int) else str(stages).count(",") + 1


if __name__ == "__main__":
    sys.exit(main())
