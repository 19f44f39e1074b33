"""Trains by the command line's wishes: `unlocked train FLAGS`, `torchrun ... launch/pipeline.py FLAGS` or
`python launch/pipeline.py FLAGS`."""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unlocked.launch.output import lasting_output

if TYPE_CHECKING:
    from unlocked.runtime import RunResult
    from unlocked.runtime.control.set_up import SetUp
    from unlocked.runtime.fields import LineParser

__all__ = ["main", "make_parser"]


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, and turns every failure into one line and an exit code: 2 for a user's mistake, 1 for a failed run, 130
    and 143 after an orderly stop."""
    told = os.environ.get("RANK", "")
    rank = int(told) if told.isdecimal() else 0  # what is no number is the engine's to refuse
    under_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    set_up = None
    try:
        if under_launcher:
            set_up = _join()
        # Imported here, so that an interrupt during these seconds ends in one line as well.
        from unlocked.data.cores import usable_cores
        from unlocked.launch.command_line import parse
        from unlocked.launch.own_workers import start_workers
        from unlocked.rules import GLOBAL_RULES
        from unlocked.runtime import Processes
        from unlocked.runtime.engines.pipeline import AUTO
        from unlocked.runtime.recipe import place, run

        given = list(sys.argv[1:] if arguments is None else arguments)
        recipe = parse(given, default_engine="processes" if under_launcher else "sequential")
        if isinstance(recipe.engine, Processes):
            if not under_launcher and recipe.engine.stages != AUTO:
                rule = recipe.training_mode
                recipe.engine.check(recipe, rule if rule in GLOBAL_RULES else None)
                count = _number_of_processes(recipe.engine.stages)
                threads = max(1, usable_cores() // count)
                return start_workers(count, "unlocked.launch.pipeline", given, threads=threads)
        elif set_up is not None:
            set_up.done()
        recipe = place(recipe)
        return _tell(run(recipe), recipe.folder)
    except ValueError as error:
        return _complain(rank, error, 2, set_up)
    except KeyboardInterrupt:
        return _complain(rank, "interrupted during set-up", 130, set_up)
    except Exception as error:
        from unlocked.runtime.saving.whole_file import DiskFullError
        from unlocked.workers.errors import LinkLostError, StageError

        cause = error.cause if isinstance(error, StageError) else error
        if not isinstance(cause, ValueError | LinkLostError | DiskFullError) and not _was_told(error):
            traceback.print_exc()
        return _complain(rank, error, 1, set_up)
    finally:
        if set_up is not None:
            set_up.done()


def make_parser() -> "LineParser":
    """All flags of `unlocked train`."""
    from unlocked.launch.command_line import make_parser as train

    return train()


def _join() -> "SetUp | None":
    """Before torch is imported, which takes seconds: from here on the other processes see this one's end.

    None: the launcher has not said enough; the engine will complain if it needs it.
    """
    from unlocked.runtime.control.set_up import SetUp
    from unlocked.runtime.control.world import World

    try:
        world = World.from_environment()
    except ValueError:
        return None
    return SetUp.begin(world)


def _number_of_processes(stages: int | str | None) -> int:
    """One for each stage that was asked for."""
    if stages is None:
        raise ValueError(
            "engine processes without a launcher starts a process per stage, but their number is not given; "
            "give --stages N or --stages auto, or start it by 'torchrun --standalone --nproc-per-node=N'"
        )
    return stages if isinstance(stages, int) else stages.count(",") + 1


def _tell(result: "RunResult", folder: Path | None) -> int:
    """Prints what came out, and where its files are; the exit code."""
    if result.is_complete:
        if result.epochs and result.test_acc1 is not None:
            print(f"test accuracy {result.test_acc1:.2f} % after {result.epochs_done} epochs", flush=True)
        rate, here = result.images_per_second, result.steps - result.first_step
        part = f", {here} of them since the resume" if result.first_step else ""
        print(f"{result.steps} micro-batches{part} in {result.train_seconds:.1f} s, {rate:.0f} images/s", flush=True)
        if result.predicted_stage_seconds:
            print(_stage_times(result), flush=True)
            print(
                f"images/s, predicted -> measured: {result.predicted_images_per_second:.0f} -> {rate:.0f}", flush=True
            )
        if folder is not None:
            print(f"saved in {folder}", flush=True)
    if result.stopped_by is None:
        if result.is_complete and result.stop_reason:
            print(f"{result.stop_reason}; {result.steps} training micro-batches", flush=True)
        return 0
    if result.is_complete:
        print(f"stopped by signal {result.stopped_by} after {result.steps} training micro-batches", flush=True)
    return 128 + result.stopped_by


def _stage_times(result: "RunResult") -> str:
    """One line: how long each stage's part of a training step was expected to take, and took."""
    pairs = zip(result.predicted_stage_seconds, result.measured_stage_seconds, strict=True)
    times = " | ".join(f"{1e3 * predicted:.2f} -> {1e3 * measured:.2f}" for predicted, measured in pairs)
    return f"ms per step and stage, predicted -> measured: {times}"


def _was_told(error: BaseException) -> bool:
    """The failure is another worker's, which has reported it with its own trace."""
    from unlocked.runtime.control.messages import RunFailed

    return isinstance(error, RunFailed | TimeoutError)


def _complain(rank: int, error: object, code: int, set_up: "SetUp | None") -> int:
    """One line on standard error, at once; the other processes are to say the same."""
    from unlocked.runtime.control.ending import Verdict, error_line
    from unlocked.runtime.control.world import stage_name

    text = str(error) or type(error).__name__
    if code == 1 and set_up is not None and "(rank " not in text:
        text = f"{stage_name(rank)} failed{'' if set_up.is_over else ' in set-up'}: {text}"
    if set_up is not None:
        set_up.leave_word(Verdict(text, code))
    # In one write: several workers share the terminal.
    sys.stderr.write(error_line(rank, text) + "\n")
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    from unlocked.launch.console import leave

    leave(main())
