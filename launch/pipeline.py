"""Trains by the command line's wishes: `unlocked train FLAGS`, `torchrun ... launch/pipeline.py FLAGS` or
`python launch/pipeline.py FLAGS`."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlocked.runtime import RunResult

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, and turns every failure into one line and an exit code: 2 for a user's mistake, 1 for a failed run, 130
    and 143 after an orderly stop."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        # Imported here, so that an interrupt during these seconds ends in one line as well.
        from unlocked.data.cores import usable_cores
        from unlocked.launch.command_line import parse
        from unlocked.launch.own_workers import start_workers
        from unlocked.runtime import Processes
        from unlocked.runtime.recipe import run

        given = list(sys.argv[1:] if arguments is None else arguments)
        launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
        recipe = parse(given, default_engine="processes" if launched else "sequential")
        if not launched and isinstance(recipe.engine, Processes):
            count = _number_of_processes(recipe.engine.stages)
            threads = max(1, usable_cores() // count)
            return start_workers(count, "unlocked.launch.pipeline", given, threads=threads)
        return _tell(run(recipe))
    except ValueError as error:
        return _complain(rank, error, 2)
    except KeyboardInterrupt:
        return _complain(rank, "interrupted during set-up", 130)
    except Exception as error:
        from unlocked.workers.errors import LinkLostError, NonFiniteLossError, StageError

        cause = error.cause if isinstance(error, StageError) else error
        if not isinstance(cause, ValueError | LinkLostError | NonFiniteLossError) and not _was_told(error):
            traceback.print_exc()
        return _complain(rank, error, 1)


def _number_of_processes(stages: int | str | None) -> int:
    """One for each stage that was asked for."""
    if stages is None:
        raise ValueError(
            "engine processes without a launcher starts a process per stage, but their number is not given; "
            "give --stages N, or start it by 'torchrun --standalone --nproc-per-node=N'"
        )
    return stages if isinstance(stages, int) else stages.count(",") + 1


def _tell(result: "RunResult") -> int:
    """Prints what came out; the exit code."""
    if result.is_complete:
        if result.epochs and result.test_acc1 is not None:
            print(f"test accuracy {result.test_acc1:.2f} % after {len(result.epochs)} epochs", flush=True)
        rate = result.images_per_second
        print(f"{result.steps} micro-batches in {result.train_seconds:.1f} s, {rate:.0f} images/s", flush=True)
        if result.predicted_stage_seconds:
            print(_stage_times(result), flush=True)
    if result.stopped_by is None:
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


def _complain(rank: int, error: object, code: int) -> int:
    """One line on standard error, at once."""
    text = " ".join(str(error).split()) or type(error).__name__
    # In one write: several workers share the terminal.
    sys.stderr.write(f"error: {text}\n" if rank == 0 else f"error [rank {rank}]: {text}\n")
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    from unlocked.launch.console import leave

    leave(main())
