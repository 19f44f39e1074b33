"""What is looked at before a run begins: optimizers, precision, and the snapshot that it goes on from."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from unlocked.data import Dataset, ImageDataset
from unlocked.kernels.trial import bfloat16_gain
from unlocked.rules import TargetForm, Task
from unlocked.runtime.arguments import try_optimizer
from unlocked.runtime.engines import ENGINES, engine_class
from unlocked.runtime.layer_optimizers import Optimizers, optimizer_for
from unlocked.runtime.learned import check_targets
from unlocked.runtime.network import Network
from unlocked.runtime.saving.identity import describe_data
from unlocked.runtime.saving.snapshots import Snapshot, find_snapshot, newest_whole
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.workers.optimizers import OptimizerFactory

__all__ = [
    "by_layer",
    "check_evaluation",
    "check_resume",
    "find_resume",
    "fingerprint_of",
    "tried_optimizers",
    "warn_of_slow_precision",
]


def tried_optimizers(optimizers: Optimizers, network: Network) -> dict[str, list[nn.Parameter]]:
    """The parameters that each layer's optimizer was tried with; of one for all layers, the last layer's that has some.
    Layers without parameters are left out.

    Raises:
        ValueError: an optimizer can't be built (`try_optimizer`).
    """
    of_layers = {name: list(block.parameters()) for name, block in zip(network.names, network.blocks, strict=True)}
    if isinstance(optimizers, Mapping):
        of_layers = {name: parameters for name, parameters in of_layers.items() if parameters and name in optimizers}
    else:
        last = next((name for name in reversed(of_layers) if of_layers[name]), network.names[-1])
        of_layers = {last: of_layers[last]}
    for name, parameters in of_layers.items():
        try_optimizer(optimizer_for(optimizers, name), parameters)
    return of_layers


def by_layer(
    optimizers: Optimizers, tried: Mapping[str, list[nn.Parameter]], tell: Callable[[OptimizerFactory, Any], Any]
) -> Any:
    """What `tell` says of the optimizer, or of each layer's by name."""
    if not isinstance(optimizers, Mapping):
        return tell(optimizers, *tried.values())
    return {name: tell(optimizers[name], parameters) for name, parameters in tried.items()}


def find_resume(settings: Settings) -> Snapshot | None:
    """The snapshot that a run goes on from, if there is one.

    Raises:
        ValueError: the one that was named is not whole; or none was, and there is no folder to look in.
    """
    if not settings.resumes_by_itself:
        return None if settings.resume is None else find_snapshot(settings.resume)
    if settings.snapshot_dir is None:
        raise ValueError("resume is 'auto', but there is no folder of snapshots to look in; give --save-path")
    snapshot, problems = newest_whole(settings.snapshot_dir)
    if snapshot is not None and problems and os.environ.get("RANK", "0") == "0":
        print(f"resuming from {snapshot.folder}, since {problems[0]}", file=sys.stderr)
    return snapshot


def fingerprint_of(
    network: Network, told: Mapping[str, Any], data: tuple[Dataset, Dataset | None], plan: StreamPlan
) -> dict[str, Any]:
    """What must not differ when a run is resumed: what it was told, its layers, task, data (training, evaluation) and
    stream."""
    train, test = data
    fingerprint = {
        "layers": network.names,
        **told,
        "data": describe_data(train),
        "evaluation data": None if test is None else describe_data(test),
        **plan.settings(),
    }
    if network.task.name != "classification":
        fingerprint["task"] = repr(network.task)
    if isinstance(train, ImageDataset) and train.classes_per_batch is not None:
        fingerprint["classes_per_batch"] = train.classes_per_batch
    return fingerprint


def warn_of_slow_precision(precision: str, device: str) -> None:
    if precision == "bf16" and torch.device(device).type == "cpu" and (gain := bfloat16_gain(device)) < 1:
        warnings.warn(
            f"precision bf16 is slower than fp32 on this processor, which has no unit for it: a matrix product takes "
            f"{1 / gain:.1f} times as long; take fp32, or auto",
            stacklevel=2,
        )


def check_evaluation(train: Dataset, test: Dataset | None, task: Task, target: TargetForm) -> None:
    """Raises a ValueError if evaluation samples or targets are of another form than those of training, which are of
    that task and read as `target`."""
    if test is None:
        return
    if test.image_shape != train.image_shape:
        raise ValueError(
            f"evaluation samples have shape {test.image_shape}, training samples {train.image_shape}; "
            "they must be equal"
        )
    if test.sample_dtype != train.sample_dtype:
        raise ValueError(
            f"evaluation samples are read as {_name(test.sample_dtype)}, training samples as "
            f"{_name(train.sample_dtype)}; convert one of them (.float() of numbers, .long() of tokens)"
        )
    if test.beside.keys() != train.beside.keys():
        raise ValueError(
            f"evaluation data brings {', '.join(test.beside) or 'nothing'} beside its samples, training data "
            f"{', '.join(train.beside) or 'nothing'}; they must be equal"
        )
    for name, value in test.beside.items():
        if value.shape[1:] != train.beside[name].shape[1:]:
            raise ValueError(
                f"evaluation data has {name} {list(value.shape[1:])} per sample, training data "
                f"{list(train.beside[name].shape[1:])}; they must be equal"
            )
    check_targets(test, task, target)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_resume(resume: Snapshot, fingerprint: Mapping[str, Any], plan: StreamPlan) -> None:
    """Raises a ValueError if the snapshot is another run's, or lies beyond this run's end."""
    resume.check(fingerprint)
    if resume.position >= len(plan):
        raise ValueError(
            f"the snapshot {resume.folder} is at step {resume.steps}, where this run of {plan.epochs} epochs has "
            "nothing left to do; give more epochs"
        )


def refuse_engine_options(owner: type, options: Mapping[str, Any]) -> None:
    """Raises a TypeError that says which engine takes an option that `owner` doesn't."""
    unknown = options.keys() - {one.name for one in fields(owner)}
    for name in sorted(unknown):
        engines = [engine_class(engine) for engine in ENGINES]
        owners = [engine for engine in engines if name in {one.name for one in fields(engine)}]
        if owners:
            told = options.get("engine")
            chosen = next((one for one in owners if one.name == told), owners[0])
            raise TypeError(
                f"{name} is an option of an engine; give it to the engine: "
                f"engine={chosen.__name__}({name}={options[name]!r})"
            )
