"""The leaderboard's command line."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from unlocked.comparison.leaderboard.results import Timing
from unlocked.models import check_model_options, model_options
from unlocked.rules import TRAINING_MODES
from unlocked.runtime.fields import (
    LARGEST,
    LARGEST_SEED,
    LONGEST_WAIT,
    LineParser,
    add_flags,
    check,
    saved,
    setting,
    setting_names,
    values_of,
)
from unlocked.runtime.job import check_device
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.recipe import Recipe, make_lr_factor, make_optimizer
from unlocked.runtime.saving.whole_file import json_text

__all__ = ["Key", "LeaderboardOptions", "parse"]

_NEVER = 1_000_000  # training micro-batches between two readings of the losses, which cost time


class Key(NamedTuple):
    """What a row stands for; a seed makes a cell of it."""

    dataset: str
    network: str
    rule: str

    @property
    def title(self) -> str:
        return f"{self.dataset} {self.network} {self.rule}"


@dataclass(frozen=True, kw_only=True)
class LeaderboardOptions:
    """What is trained, for how long, and where it is kept.

    Attributes:
        recipe: what all cells share; dataset, model, its options, rule and seed are put in.
        network_options: each for the networks that take it.
        command: what was typed.
    """

    recipe: Recipe
    command: str
    network_options: ModelOptions = field(default_factory=ModelOptions)
    datasets: tuple[str, ...] = setting(("digits",), "datasets, by their names")
    models: tuple[str, ...] = setting(("SmallConv", "MLP"), "networks, by their names")
    rules: tuple[str, ...] = setting(
        (), "rules, by the names of --training-mode; unless given all that there are", choices=lambda: TRAINING_MODES
    )
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "one run each", at_least=0, at_most=LARGEST_SEED)
    minutes: float | None = setting(
        None,
        "of training for a cell, in the place of --num-epochs, at the speed of a trial; evaluation comes on top",
        above=0,
        at_most=1e6,
    )
    jobs: int = setting(1, "cells trained at once, one thread each; what is timed runs alone", at_least=1, at_most=1024)
    processes: int = setting(2, "of the pipelines that are timed", at_least=2, at_most=1024)
    speed_steps: int = setting(60, "training micro-batches of a timed run", at_least=1, at_most=LARGEST)
    repeats: int = setting(2, "timed runs in one process and as a pipeline, in turn; 0: none", at_least=0, at_most=1000)
    timeout: float = setting(7200.0, "seconds for one run; what takes longer has failed", above=0, at_most=LONGEST_WAIT)
    output: Path = setting(
        Path("runs/leaderboard"), "folder for cells/, leaderboard.html and two .csv", place="new folder"
    )
    retry: bool = setting(False, "train again what had failed")
    report_only: bool = setting(False, "train and measure nothing: make the page of what is there")
    train_only: bool = setting(False, "train cells and leave the measuring and the page to another call")

    def __post_init__(self) -> None:
        check(self)
        if not self.rules:
            object.__setattr__(self, "rules", TRAINING_MODES)
        for name in ("datasets", "models", "rules", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {' '.join(map(str, values)) or 'none'}; give one or more, each once")
        if self.report_only and self.train_only:
            raise ValueError("report_only and train_only leave nothing to do; give one of them")
        if self.minutes is not None and 60 * self.minutes >= self.timeout:
            raise ValueError(
                f"minutes is {self.minutes:g}, and no run may take longer than the timeout of {self.timeout:g} "
                "seconds, its evaluations included; give a longer timeout"
            )
        for dataset in self.datasets:
            replace(self.recipe, dataset=dataset)
        for option, value in values_of(self.network_options).items():
            if not any(option in model_options(model) for model in self.models):
                check_model_options(self.models[0], {option: value})  # refuses it, if it is given

    @property
    def keys(self) -> list[Key]:
        """All rows, those of one table beside each other."""
        return [Key(d, m, r) for d in self.datasets for m in self.models for r in self.rules]

    def cells(self) -> Iterator[tuple[Key, int]]:
        """All cells; every row's first seed before any row's second."""
        for seed in self.seeds:
            for key in self.keys:
                yield key, seed

    def recipe_of(self, key: Key, seed: int) -> Recipe:
        """The run of a cell. An option that its network does not take is left out."""
        own = model_options(key.network)
        options = {name: value for name, value in values_of(self.network_options).items() if name in own}
        return replace(
            self.recipe, dataset=key.dataset, model=key.network, training_mode=key.rule, seed=seed, **options
        )

    def settings_of(self, key: Key) -> dict[str, Any]:
        """What a kept cell must have been made with."""
        recipe = self.recipe_of(key, 0)
        names = (*_TOLD, *_TOLD_OF_SCHEDULES.get(recipe.lr_scheduler, ()), *model_options(key.network))
        told = {name: saved(recipe)[name] for name in names if name in saved(recipe)}
        if key.dataset in _OF_A_FOLDER:
            told["dataset_dir"] = str(recipe.dataset_dir.resolve())
        budget = {"minutes": self.minutes} if self.minutes else {"num_epochs": recipe.num_epochs}
        found: dict[str, Any] = json.loads(json_text(told | budget))  # as a kept cell has them
        return found

    @property
    def timing(self) -> Timing:
        """How rows are timed."""
        return Timing(seed=self.seeds[0], speed_steps=self.speed_steps, repeats=self.repeats, processes=self.processes)

    def path_of(self, key: Key, part: int | str) -> Path:
        """The file of a seed's cell, or of the row's `"measures"`."""
        return self.output / "cells" / f"{key.dataset}_{key.network}_{key.rule}_{part}.json"


_TOLD = (
    *("dataset", "image_size", "lr", "batch_size", "drop_last", "weight_decay", "momentum", "optimizer", "waveform"),
    *("temperature", "label_smoothing", "dropout", "lr_scheduler", "precision", "statistics_batches", "device"),
)
_TOLD_OF_SCHEDULES = {"MultiStepLR": ("milestone", "gamma"), "ReduceLROnPlateau": ("gamma",)}
_OF_A_FOLDER = ("folder", "text")  # datasets that are whatever lies in --dataset-dir
_SHARED = (
    *("dataset_dir", "image_size", "num_epochs", "lr", "batch_size", "test_batch_size", "drop_last", "weight_decay"),
    *("momentum", "optimizer", "waveform", "temperature", "label_smoothing", "dropout", "lr_scheduler", "milestone"),
    *("gamma", "precision", "device"),
)


def make_parser() -> LineParser:
    """All flags of the command."""
    parser = LineParser(
        prog="unlocked leaderboard",
        description="Trains every rule on every network and dataset with every seed under one budget, measures speed, "
        "memory, traffic and locality of each, and makes a page and tables. What is there is not trained again; the "
        "same command given several times shares the cells out.",
    )
    group = parser.add_argument_group("what is compared, how much, and what is written")
    add_flags(group, LeaderboardOptions)
    add_flags(parser.add_argument_group("what all cells share"), Recipe, _SHARED)
    add_flags(parser.add_argument_group("options of single models"), ModelOptions)
    return parser


def parse(arguments: Sequence[str]) -> LeaderboardOptions:
    """Reads the command line.

    Raises:
        ValueError: a mistake, in one line.
    """
    given = vars(make_parser().parse_args(arguments))
    shared = {name: given.pop(name) for name in list(given) if name in (*_SHARED, *setting_names(ModelOptions))}
    if "minutes" in given and "num_epochs" in shared:
        raise ValueError("--minutes and --num-epochs are two budgets; give one of them")
    networks = ModelOptions(**{name: shared.pop(name) for name in list(shared) if name in setting_names(ModelOptions)})
    check(networks)
    recipe = Recipe(**shared, plain=True, print_freq=_NEVER, threads=1)
    check_device(recipe.device)
    make_optimizer(recipe)
    make_lr_factor(recipe)
    command = shlex.join(["unlocked", "leaderboard", *arguments])
    return LeaderboardOptions(recipe=recipe, network_options=networks, command=command, **given)
