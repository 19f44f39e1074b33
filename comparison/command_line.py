"""The comparison's command line."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unlocked.runtime.engines.pipeline import PipelineOptions
from unlocked.runtime.fields import (
    LARGEST,
    LARGEST_SEED,
    LONGEST_WAIT,
    LineParser,
    add_flags,
    check,
    setting,
    setting_names,
)
from unlocked.runtime.job import check_device
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.text_options import TextOptions

__all__ = ["CompareOptions", "make_parser", "parse"]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What is compared, and how often.

    Attributes:
        recipe: model, data, optimizer and first seed, the same for all contenders.
        queue_depth: of the local rules' pipelines.
        trial_steps: of every form of a pipeline that is tried.
        command: what was typed.
    """

    recipe: Recipe
    queue_depth: int
    trial_steps: int
    command: str
    epochs: int = setting(
        help="of an accuracy run; 0: none (digits: 4, else 10)",
        flag=("--epochs", "--num-epochs"),
        at_least=0,
        at_most=LARGEST,
    )
    speed_steps: int = setting(
        help="training micro-batches of a speed run (digits: 46, else 200)",
        flag="--max-steps",
        at_least=1,
        at_most=LARGEST,
    )
    repeats: int = setting(help="speed runs of every contender (3)", at_least=0, at_most=LARGEST)
    seeds: int = setting(help="accuracy runs of every contender (digits: 3, else 1)", at_least=0, at_most=LARGEST)
    processes: int = setting(2, "of every pipeline; they share the cores out", at_least=2, at_most=1024)
    only: tuple[str, ...] = setting((), "contenders, by the beginning of their names")
    chunks: tuple[int, ...] | None = setting(
        None, "that backpropagation's pipelines try (1 for GPipe, 2, 4, 8)", at_least=1, at_most=LARGEST
    )
    timeout: float = setting(7200.0, "seconds for one run; what takes longer has failed", above=0, at_most=LONGEST_WAIT)
    output: Path = setting(
        Path("runs/comparison"), "folder for report.json, report.html and two .csv", place="new folder"
    )
    tensorboard: Path | None = setting(None, "write TensorBoard's event files below this folder", place="new folder")

    def __post_init__(self) -> None:
        check(self)
        if not self.repeats and not (self.seeds and self.epochs):
            raise ValueError("nothing to run: give --repeats, or --num-epochs and --seeds, of at least 1")
        if self.recipe.seed + self.seeds > LARGEST_SEED:
            raise ValueError(f"{self.seeds} seeds from {self.recipe.seed} on go beyond the last one, {LARGEST_SEED}")


_SHARED = (
    *("dataset", "dataset_dir", "image_size", "model", "lr", "batch_size", "drop_last", "test_batch_size"),
    *("weight_decay", "momentum", "optimizer", "waveform", "temperature", "label_smoothing", "seed", "precision"),
    *sorted(setting_names(ModelOptions)),
    *sorted(setting_names(TextOptions)),
)
"""The recipe's settings that the command line gives for all contenders, beside the device."""


def parse(arguments: Sequence[str]) -> CompareOptions:
    """Reads the command line.

    Raises:
        ValueError: a mistake, in one line.
    """
    given = vars(make_parser().parse_args(arguments))
    shared = {name: given.pop(name) for name in (*_SHARED, "device") if name in given}
    recipe = Recipe(**shared, plain=True, print_freq=_NEVER)
    check_device(recipe.device)
    depth = {"queue_depth": given.pop("queue_depth")} if "queue_depth" in given else {}
    digits, few = recipe.dataset == "digits", given.pop("quick")
    unless_given = {
        "epochs": 3 if few else 4 if digits else 10,
        "speed_steps": 30 if few else 46 if digits else 200,
        "repeats": 1 if few else 3,
        "seeds": 1 if few else 3 if digits else 1,
    }
    return CompareOptions(
        recipe=recipe,
        queue_depth=PipelineOptions(**depth).queue_depth,
        trial_steps=5 if few else 10 if digits else 20,
        command=shlex.join(["python", "launch/compare.py", *arguments]),
        **unless_given | given,
    )


_NEVER = 1_000_000  # training micro-batches between two readings of the losses, which cost time


def make_parser() -> argparse.ArgumentParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked compare",
        description="Compares local learning with backpropagation on this machine. Every contender trains in processes "
        "of its own: speed runs without evaluation, interleaved, and accuracy runs with it.",
        epilog="--study memory and --study stages measure other things; their own --help tells.",
    )
    group = parser.add_argument_group("what is trained, the same for all")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add_flags(group, Recipe, (*_SHARED, "device"), {"device": device})
    add_flags(group, PipelineOptions, {"queue_depth"})
    group = parser.add_argument_group("how much, and what is written")
    add_flags(group, CompareOptions)
    group.add_argument("--quick", action="store_true", help="once, and little")
    return parser
