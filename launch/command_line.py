"""The command line: flags of a recipe, of the settings and of the engines, made from where those are written."""

import argparse
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from unlocked.runtime.config_file import as_yaml, read_config
from unlocked.runtime.engines import ENGINES, engine_class
from unlocked.runtime.fields import LineParser, add_flags, flag_of, setting_names
from unlocked.runtime.job import Engine
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.paths import checked_path
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.saving.run_folder import CONFIG, run_folder_of

__all__ = ["AUTHORS_DEFAULTS", "TOPICS", "make_parser", "parse"]

SAVE_PATH = "experiments"
"""Where the command line saves unless it is told otherwise: the authors' folder."""
_VARIABLE = "UNLOCKED_SAVE_PATH"

TOPICS: Mapping[str, Sequence[str]] = {
    "data and model": (
        *(
            "dataset",
            "dataset_dir",
            "image_size",
            "sequence_length",
            "num_train",
            "num_test",
            "model",
            "pool",
            "dropout",
        ),
        *("batch_size", "test_batch_size", "drop_last", "classes_per_batch"),
    ),
    "options of single models": tuple(sorted(setting_names(ModelOptions))),
    "local rule": ("training_mode", "waveform", "temperature", "label_smoothing", "output_loss"),
    "length of the run": ("num_epochs", "max_steps", "early_stop", "no_eval", "statistics_batches"),
    "optimizer and learning rate": (
        *("optimizer", "lr", "weight_decay", "momentum", "clip_grad_norm"),
        *("lr_scheduler", "milestone", "gamma", "patience", "warmup_steps"),
    ),
    "files of the run": (
        *("save_path", "experiment_name", "save_best_model", "snapshot_every", "keep_snapshots", "resume"),
        *("summary", "trace"),
    ),
    "what is told while it runs": ("print_freq", "plain", "tensorboard", "mlflow", "wandb", "trackio"),
    "how it is computed": (
        "seed",
        "device",
        "kernels",
        "precision",
        "deterministic",
        "compile",
        "threads",
        "prefetch",
        "timeout",
    ),
}
"""Heading of the help -> the recipe's settings below it."""

AUTHORS_DEFAULTS: Mapping[str, Any] = {
    "dataset": "CIFAR10",
    "dataset_dir": "~/Datasets",
    "model": "LLS_SmallConv",
    "num_epochs": 1,
    "lr": 0.1,
    "optimizer": "SGD",
    "lr_scheduler": "ReduceLROnPlateau",
    "patience": 1000,
    "print_freq": 300,
    "experiment_name": "LLS",
}
"""The defaults of the authors' main.py (LLS-DNN, release of WACV 2025) that are not ours."""


def parse(arguments: Sequence[str] | None, *, default_engine: str, parser: LineParser | None = None) -> Recipe:
    """Reads the command line: what it says goes before a config file's settings, and those before the defaults.

    Args:
        arguments: without the program's name; None: those of this process.
        default_engine: where neither --engine nor --stages is given.
        parser: of the same flags; default: that of `unlocked train`.

    Raises:
        ValueError: a mistake, in one line.
        SystemExit: of --help and --print-config, with code 0.
    """
    given = vars((parser or make_parser()).parse_args(arguments))
    printed = given.pop("print_config")
    told = dict(AUTHORS_DEFAULTS) if given.pop("authors_defaults") else {}
    config = given.pop("config")
    from_file = {} if config is None else read_config(checked_path("config", config, ""), _settings_of_files())
    del given["record_gpu_mem"]
    name = given.pop("engine") or ("processes" if "stages" in given else "")
    if not isinstance(filed := from_file.pop("engine", None), str | None):
        raise ValueError(f"config {config}: engine is {filed!r}; it must be the name of one: {', '.join(ENGINES)}")
    # Whoever has started several processes means them to work together, wherever the file's run was.
    name = name or (filed if filed and default_engine == "sequential" else default_engine)
    if filed != name:  # options of an engine that is not taken
        from_file = {key: v for key, v in from_file.items() if key not in _owners() or name in _owners()[key]}
    if "milestone" in given and "lr_scheduler" not in given:
        from_file.pop("lr_scheduler", None)  # a run's config.json names one: milestones that are given go before it
    if given.pop("no_save"):
        if "save_path" in given:
            raise ValueError("--no-save and --save-path exclude each other; leave one of them out")
        given["save_path"] = None
    told |= from_file | given
    if "save_path" not in told:
        told["save_path"] = _usual_save_path(told)
    options = {option: told.pop(option) for option in list(told) if option in _owners()}
    recipe = Recipe(engine=_make_engine(name, options), **told)
    if printed:
        print(as_yaml({key: value for key, value in recipe.config().items() if value is not None}), end="")
        sys.exit(0)
    return recipe


def make_parser() -> LineParser:
    """All flags of `unlocked train`, by topic."""
    parser = LineParser(
        prog="unlocked train",
        usage="unlocked train [FLAGS]",
        description="Trains a network by local learning rules, in one process or as a pipeline of processes.",
        epilog="As a pipeline on this machine: unlocked train --stages 2 --dataset CIFAR10 ... On a cluster: torchrun "
        "--nnodes=... --nproc-per-node=... -m unlocked.launch.pipeline --dataset CIFAR10 ...",
    )
    general = parser.add_argument_group("settings from elsewhere")
    general.add_argument(
        "--config",
        metavar="FILE",
        help="settings in YAML, JSON or TOML, such as a run's config.json; flags go before it",
    )
    general.add_argument(
        "--print-config", action="store_true", help="print all settings as such a file, and train nothing"
    )
    general.add_argument(
        "--authors-defaults",
        action="store_true",
        help="the defaults of the LLS authors' code where ours differ: "
        + ", ".join(f"{key.replace('_', '-')} {value}" for key, value in AUTHORS_DEFAULTS.items()),
    )
    for topic, names in TOPICS.items():
        group = parser.add_argument_group(topic)
        for name in names:
            add_flags(group, Recipe, {name})
            if name == "plain":
                group.add_argument(
                    "--record-gpu-mem",
                    action="store_true",
                    help="changes nothing: the summary always has the peak memory",
                )
            if name == "save_path":
                group.add_argument("--no-save", action="store_true", help="leave no files of the run")
    running = parser.add_argument_group("engine")
    running.add_argument(
        "--engine",
        metavar="NAME",
        help="sequential, streams or processes; default: processes under torchrun and where --stages is given, else "
        "sequential",
    )
    _add_engine_flags(parser)
    return parser


def _settings_of_files() -> dict[str, type | None]:
    """Every setting that a config file may have -> the dataclass that has it."""
    options: dict[str, type | None] = {option: engine_class(owners[0]) for option, owners in _owners().items()}
    return {"engine": None, **options, **dict.fromkeys(setting_names(Recipe), Recipe)}


def _usual_save_path(told: dict[str, Any]) -> Path | None:
    """Where to save if nothing says so: beside the run that goes on, else where all runs go."""
    if told.get("resume") not in (None, "auto", Path("auto")):
        old = run_folder_of(checked_path("resume", told["resume"], "folder"))
        if os.path.isfile(old / CONFIG):  # unlike pathlib's, False as well where the name is too long
            told.setdefault("experiment_name", old.name)
            return old.parent
    place = os.environ.get(_VARIABLE, SAVE_PATH)
    try:
        return checked_path("save_path", place, "new folder") if place else None
    except ValueError as error:  # nobody has asked for it: the run goes on
        if os.environ.get("RANK", "0") == "0":
            warnings.warn(f"nothing of the run is saved: {error}, by --save-path", stacklevel=2)
        return None


def _owners() -> dict[str, list[str]]:
    """Every engine's options -> the engines that have them."""
    owners: dict[str, list[str]] = {}
    for engine in ENGINES:
        for one in fields(engine_class(engine)):
            owners.setdefault(one.name, []).append(engine)
    return owners


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """A group for each set of engines that share options."""
    groups: dict[tuple[str, ...], set[str]] = {}
    for option, owners in _owners().items():
        groups.setdefault(tuple(owners), set()).add(option)
    for engines, names in groups.items():
        title = f"engine {engines[0]}" if len(engines) == 1 else f"engines {' and '.join(engines)}"
        add_flags(parser.add_argument_group(title), engine_class(engines[0]), names)


def _make_engine(name: str, options: Mapping[str, Any]) -> Engine:
    """The engine, if it has all of these options."""
    made = engine_class(name)
    owners = _owners()
    foreign = [option for option in options if name not in owners[option]]
    if foreign:
        flags = {option: flag_of(engine_class(owners[option][0]), option) for option in foreign}
        users = ", ".join(f"{flags[option]} by {' and '.join(owners[option])}" for option in foreign)
        fit = [engine for engine in ENGINES if all(engine in owners[option] for option in options)]
        instead = f", or take --engine {' or '.join(fit)}" if fit else ""
        raise ValueError(
            f"engine {name} does not use {', '.join(flags.values())} (used: {users}); leave them out{instead}"
        )
    engine: Engine = made(**options)
    return engine
