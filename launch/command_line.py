"""The command line: flags of a recipe, of the settings and of the engines, made from where those are written."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from unlocked.runtime.engines import ENGINES, engine_class
from unlocked.runtime.fields import LineParser, add_flags, flag_of, setting_names
from unlocked.runtime.job import Engine
from unlocked.runtime.model_options import ModelOptions
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.settings import Settings

__all__ = ["parse"]


def parse(arguments: Sequence[str] | None, *, default_engine: str) -> Recipe:
    """Reads the command line.

    Args:
        arguments: without the program's name; None: those of this process.
        default_engine: where neither --engine nor --stages is given.

    Raises:
        ValueError: a mistake, in one line.
    """
    parser = LineParser(
        prog="unlocked train",
        description="Trains a network by local learning rules, in one process or as a pipeline of processes.",
        epilog="As a pipeline on this machine: unlocked train --stages 2 --dataset CIFAR10 ... On a cluster: torchrun "
        "--nnodes=... --nproc-per-node=... -m unlocked.launch.pipeline --dataset CIFAR10 ...",
    )
    training = parser.add_argument_group("training (the authors' flags, and more)")
    add_flags(training, Recipe, setting_names(Recipe) - setting_names(Settings) - setting_names(ModelOptions))
    add_flags(parser.add_argument_group("options of single models"), ModelOptions)
    training.add_argument("--pool", choices=["MAX"], default="MAX", help="between the blocks")
    training.add_argument(
        "--record-gpu-mem", action="store_true", help="changes nothing: the summary always has the peak memory"
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--engine",
        help="sequential, streams or processes; default: processes under torchrun and where --stages is given, else "
        "sequential",
    )
    add_flags(running, Settings)
    _add_engine_flags(parser)
    given = vars(parser.parse_args(arguments))
    for flag in ("pool", "record_gpu_mem"):
        del given[flag]
    name = given.pop("engine") or ("processes" if "stages" in given else default_engine)
    options = {option: given.pop(option) for option in list(given) if option in _owners()}
    return Recipe(engine=_make_engine(name, options), **given)


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
