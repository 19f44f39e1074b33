"""The comparison's command line."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unlocked.runtime.engines.pipeline import PipelineOptions
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.settings import LineParser, add_flags

__all__ = ["CompareOptions", "parse"]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and how often.

    Attributes:
        recipe: model, data, optimizer and first seed, the same for all contenders.
        queue_depth: of the local rules' pipelines.
        epochs: of an accuracy run; 0: no accuracy runs.
        speed_steps: training micro-batches of a speed run.
        trial_steps: of every form of a pipeline that is tried.
        seeds: accuracy runs of every contender.
        chunks: of backpropagation's pipelines; None: the usual ones.
    """

    recipe: Recipe
    queue_depth: int
    epochs: int
    speed_steps: int
    trial_steps: int
    repeats: int
    seeds: int
    processes: int
    only: tuple[str, ...]
    chunks: tuple[int, ...] | None
    output: Path
    tensorboard: Path | None
    timeout: float
    command: str


_SHARED = (
    *("dataset", "dataset_dir", "model", "lr", "batch_size", "test_batch_size", "weight_decay", "momentum"),
    *("optimizer", "waveform", "temperature", "label_smoothing", "seed", "precision"),
)
"""The recipe's settings that the command line gives for all contenders, beside the device."""


def parse(arguments: Sequence[str]) -> CompareOptions:
    """Reads the command line.

    Raises:
        ValueError: a mistake, in one line.
    """
    given = _parser().parse_args(arguments)
    shared = {name: getattr(given, name) for name in (*_SHARED, "device") if hasattr(given, name)}
    recipe = Recipe(**shared, plain=True, print_freq=_NEVER)
    depth = {"queue_depth": given.queue_depth} if hasattr(given, "queue_depth") else {}
    digits = recipe.dataset == "digits"
    few = given.quick
    options = CompareOptions(
        recipe=recipe,
        queue_depth=PipelineOptions(**depth).queue_depth,
        epochs=_first(given.num_epochs, 3 if few else 4 if digits else 10),
        speed_steps=_first(given.max_steps, 30 if few else 46 if digits else 200),
        trial_steps=5 if few else 10 if digits else 20,
        repeats=_first(given.repeats, 1 if few else 3),
        seeds=_first(given.seeds, 1 if few else 3 if digits else 1),
        processes=given.processes,
        only=tuple(given.only),
        chunks=None if given.chunks is None else tuple(given.chunks),
        output=given.output,
        tensorboard=given.tensorboard,
        timeout=given.timeout,
        command=shlex.join(["python", "launch/compare.py", *arguments]),
    )
    for flag, value, least in (
        ("--num-epochs", options.epochs, 0),
        ("--max-steps", options.speed_steps, 1),
        ("--repeats", options.repeats, 0),
        ("--seeds", options.seeds, 0),
        ("--processes", options.processes, 2),
        *(("--chunks", n, 1) for n in options.chunks or ()),
    ):
        if value < least:
            raise ValueError(f"{flag} is {value}; it must be at least {least}")
    if not options.repeats and not (options.seeds and options.epochs):
        raise ValueError("nothing to run: give --repeats, or --num-epochs and --seeds, of at least 1")
    return options


_NEVER = 1_000_000  # training micro-batches between two readings of the losses, which cost time


def _first(value: int | None, otherwise: int) -> int:
    return otherwise if value is None else value


def _parser() -> argparse.ArgumentParser:
    parser = LineParser(
        prog="unlocked compare",
        description="Compares local learning with backpropagation on this machine. Every contender trains in processes "
        "of its own: speed runs without evaluation, interleaved, and accuracy runs with it.",
        epilog="--study memory and --study stages measure other things; their own --help tells.",
    )
    group = parser.add_argument_group("what is trained, the same for all")
    add_flags(group, Recipe, _SHARED)
    add_flags(group, PipelineOptions, {"queue_depth"})
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add = parser.add_argument_group("how much").add_argument
    add("--num-epochs", "--epochs", type=int, help="of an accuracy run; 0: none (digits: 4, else 10)")
    add("--max-steps", type=int, help="training micro-batches of a speed run (digits: 46, else 200)")
    add("--repeats", type=int, help="speed runs of every contender (3)")
    add("--seeds", type=int, help="accuracy runs of every contender (digits: 3, else 1)")
    add("--processes", type=int, default=2, help="of every pipeline; they share the cores out")
    add("--only", nargs="*", default=[], metavar="NAME", help="contenders, by the beginning of their names")
    add("--chunks", type=int, nargs="*", help="that backpropagation's pipelines try (1 for GPipe, 2, 4, 8)")
    add("--quick", action="store_true", help="once, and little")
    add("--timeout", type=float, default=7200.0, help="seconds for one run; what takes longer has failed")
    add = parser.add_argument_group("what is written").add_argument
    add("--output", type=Path, default=Path("runs/comparison"), help="folder for report.json, report.html and two .csv")
    add("--tensorboard", type=Path, help="write TensorBoard's event files below this folder")
    return parser
