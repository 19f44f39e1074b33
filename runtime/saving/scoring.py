"""Scores saved weights: what an evaluation of the run that saved them reports, or would report.

`model_final.pt` and `model_best.pt` hold the weights as they were evaluated, BatchNorm's re-estimated statistics
included. A snapshot holds them in the middle of training: its statistics are re-estimated first, from the same
micro-batches as at the end of its epoch, and a schedule-free optimizer's weights are switched to their average.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from unlocked.data import Dataset
from unlocked.kernels.images import load_batch
from unlocked.kernels.precision import check_precision, float32_products
from unlocked.models.errors import first_line
from unlocked.rules import LocalRule
from unlocked.runtime.batch_statistics import check_batch_statistics
from unlocked.runtime.input import beside_of, make_source, probe_sample, ready
from unlocked.runtime.job import check_device
from unlocked.runtime.learned import learned_from
from unlocked.runtime.metrics.records import Scores
from unlocked.runtime.network import Model, Network, backpropagation_network, build_layer, build_network, build_stage
from unlocked.runtime.saving.layer_files import UNREADABLE, layer_file_name
from unlocked.runtime.saving.snapshots import Snapshot
from unlocked.runtime.saving.tensor_file import check_weights, load_tensors
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.stage import Stage

__all__ = ["evaluation_plan", "load_weights", "make_stage", "score_snapshot", "score_weights", "scores_of"]

_SHOWN = 3  # names in an error about many


def load_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a `model_final.pt` or `model_best.pt`, by name. Nothing in the file is executed.

    Raises:
        ValueError: there is no such file, it holds something else, or not what was written there (names it).
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a model_final.pt, a model_best.pt or a folder of snapshots")
    check_weights(path)
    try:
        content = load_tensors(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a file of weights, or is damaged: {first_line(error)}") from error
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__} data where tensors by name are due")
    if strange := [name for name, value in content.items() if not _is_plain(value)]:
        raise ValueError(
            f"{path} holds {'; '.join(_listed('sparse, quantised, complex or empty tensors', strange))}; weights are "
            "dense tensors of real numbers"
        )
    return content


def score_weights(
    model: Model,
    weights: Mapping[str, Tensor],
    test: Dataset,
    *,
    batch_size: int,
    device: str = "cpu",
    precision: str = "fp32",
) -> Scores:
    """Loss and accuracies of `weights` on `test`.

    Args:
        model: the network they belong to; holds them afterwards.
        weights: by the names of a run's result; those of rules are not needed and left out.
        batch_size: rows of an evaluation micro-batch.
        device, precision: as in `Trainer`. With the run's own, and its batch size, the figures are the run's bits.

    Raises:
        ValueError: the weights are of another network (lists what is missing, unexpected, or of another shape).
    """
    network = _network(model, test)
    test = _ready(test, network)
    _fill(network, _without_rules(network, weights))
    plan = evaluation_plan(test, batch_size)
    return _evaluate(make_stage(network, test, test, plan, 1, device, precision), plan, 1, precision, network.sums)


def score_snapshot(
    model: Model, snapshot: Snapshot, train: Dataset, test: Dataset, *, batch_size: int, device: str = "cpu"
) -> Scores:
    """Loss and accuracies of a snapshot on `test`: what the run would report if its epoch ended there.

    Args:
        train: the run's training data, for BatchNorm's statistics.

    Raises:
        ValueError: the snapshot is of another network or of other training data, or damaged (names the file).
    """
    settings = snapshot.settings
    if settings["train_size"] != len(train):
        raise ValueError(
            f"snapshot {snapshot.folder} was made with {settings['train_size']} training samples, this data has "
            f"{len(train)}; give the run's --dataset"
        )
    network = _network(model, train, settings["seed"])
    train, test = _ready(train, network), _ready(test, network)
    whole = settings["layers"] == ["network"]  # under BP and DFA all blocks are one layer
    states = _read_states(snapshot, ["network"] if whole else network.names)
    tensors = {
        f"{name}.block.{key}": value
        for name, state in states.items()
        for key, value in _averaged(network, name, state).items()
    }
    _fill(network, _without_rules(network, tensors))
    one_epoch = StreamPlan(
        epochs=1,
        train_size=len(train),
        batch_size=settings["batch_size"],
        eval_size=len(test),
        eval_batch_size=batch_size,
        statistics_batches=settings["statistics_batches"],
        drop_last=settings["drop_last"],
    )
    plan = replace(one_epoch, epochs=(snapshot.steps - 1) // one_epoch.steps_per_epoch + 1)
    start = len(plan) - plan.statistics_per_epoch - plan.evaluations_per_epoch
    precision = settings["precision"]
    if whole:
        network = backpropagation_network(network)
    stage = make_stage(network, train, test, plan, start, device, precision)
    for layer in stage.layers:
        layer.set_clock(states[layer.name]["clock"])  # the key of what is drawn, which statistics see as training does
    return _evaluate(stage, plan, start, precision, network.sums)


def evaluation_plan(test: Dataset, batch_size: int) -> StreamPlan:
    """A stream of which the items from position 1 on evaluate `test` once."""
    rows = min(batch_size, len(test))  # of the training micro-batch that a plan must begin with, which is left out
    return StreamPlan(
        epochs=1,
        train_size=rows,
        batch_size=rows,
        eval_size=len(test),
        eval_batch_size=batch_size,
        statistics_batches=0,
    )


def make_stage(
    network: Network,
    train: Dataset,
    test: Dataset,
    plan: StreamPlan,
    start: int,
    device: str,
    precision: str,
) -> Stage:
    """All layers and the data of the plan's items from `start` on, for evaluation alone.

    Raises:
        ValueError: an evaluation micro-batch is too small for a layer that keeps no statistics.
    """
    check_batch_statistics([replace(use, training=False) for use in network.batch_statistics], plan)
    check_device(device)
    place = torch.device(device)
    check_precision(precision, place)
    optimizer = partial(torch.optim.SGD, lr=0.0)  # never steps
    layers = [
        build_layer(network, i, rule=LocalRule, optimizer=optimizer, device=place, step=None, precision=precision)
        for i in range(len(network.blocks))
    ]
    source = make_source(
        train,
        test,
        plan=plan,
        start=start,
        seed=network.infos[0].seed,
        device=place,
        load_batch=load_batch,
        prefetch=None,
        timeout=300.0,
    )
    return build_stage(network, 0, range(len(layers)), layers, source, None)


def scores_of(stage: Stage, count: int, sizes: Mapping[str, int] = MappingProxyType({})) -> Scores:
    """What the stage's evaluation of `count` samples came to.

    Args:
        sizes: how long each sum of the task's `measure` is.

    Raises:
        ValueError: the loss is not finite.
    """
    output = stage.layers[-1]
    found = output.task.read(output.eval_totals.tolist(), count, sizes)
    loss = found.loss
    if not isfinite(loss):
        raise ValueError(
            f"the evaluation loss is {loss}: the weights or the data hold values that are not finite, or too large"
        )
    return Scores(loss=loss, acc1=found.acc1, acc5=found.acc5, figures=found.others)


def _network(model: Model, data: Dataset, seed: int = 0) -> Network:
    return build_network(
        model,
        input_shape=data.image_shape,
        num_classes=data.num_classes,
        seed=seed,
        sample=probe_sample(data),
        learned=learned_from(data, None),
        beside=beside_of(data),
    )


def _ready(data: Dataset, network: Network) -> Dataset:
    return ready(data, network.task, network.target, network.infos[-1].num_classes)


def _read_states(snapshot: Snapshot, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each layer's state, by name."""
    states = {}
    for index, name in enumerate(names):
        try:
            states[name] = snapshot.read(index, name, torch.device("cpu"))
        except FileNotFoundError as error:
            raise ValueError(
                f"snapshot {snapshot.folder} has no file {layer_file_name(index, name)}: it is of another network, "
                f"with the layers {', '.join(snapshot.settings['layers'])}"
            ) from error
    return states


def _without_rules(network: Network, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer.block.name: tensor}: as local rules have it, also for weights of one layer called network."""
    rules = tuple(f"{name}.rule." for name in (*network.names, "network"))
    found = {}
    for name, value in weights.items():
        if name.startswith(rules):
            continue
        if name.startswith("network.block.body."):
            layer, _, rest = name.removeprefix("network.block.body.").partition(".")
            name = f"{layer}.block.{rest}"
        found[name] = value
    return found


def _fill(network: Network, weights: Mapping[str, Tensor]) -> None:
    expected = {
        f"{name}.block.{key}": value
        for name, block in zip(network.names, network.blocks, strict=True)
        for key, value in block.state_dict().items()
    }
    shapes = [
        f"{name} has shape {tuple(weights[name].shape)}, the model's {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    types = [
        f"{name} is {weights[name].dtype}, the model's {value.dtype}"
        for name, value in expected.items()
        if name in weights and weights[name].dtype != value.dtype
    ]
    problems = [
        *_listed("missing", [name for name in expected if name not in weights]),
        *_listed("unexpected", [name for name in weights if name not in expected]),
        *_listed("other shapes", shapes),
        *_listed("other types", types),
    ]
    if problems:
        raise ValueError(
            f"the weights don't fit the model: {'; '.join(problems)}; give the run's --model and --dataset"
        )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(weights[name])


def _is_plain(value: Tensor) -> bool:
    """Dense, with values, of real numbers or truth values: what `copy_` takes over as it is."""
    return value.layout == torch.strided and not (value.is_meta or value.is_quantized or value.is_complex())


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]


def _averaged(network: Network, name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """The block's tensors with the weights that a schedule-free optimizer evaluates, if one trained them.

    In training it holds y = (1 - beta) z + beta x of its average x and its iterate z (Defazio et al., "The road less
    scheduled", 2024), hence x = y + (1 - 1 / beta) (z - y).
    """
    block: dict[str, Tensor] = state["block"]
    groups = state["optimizer"].get("param_groups", [])
    if not any(group.get("train_mode") for group in groups):
        return block
    blocks = network.blocks if name == "network" else [network.blocks[network.names.index(name)]]
    prefixes = [f"body.{n}." for n in network.names] if name == "network" else [""]
    trained = [f"{p}{key}" for p, b in zip(prefixes, blocks, strict=True) for key, _ in b.named_parameters()]
    group = groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    first = len(group["params"]) - len(trained)  # the rule's parameters come before the block's
    for i, key in enumerate(trained, first):
        if "z" in state["optimizer"]["state"].get(i, {}):
            block[key] = block[key].lerp(state["optimizer"]["state"][i]["z"], 1 - 1 / beta)
    return block


def _evaluate(stage: Stage, plan: StreamPlan, start: int, precision: str, sizes: Mapping[str, int]) -> Scores:
    """Runs the plan's last items: statistics and evaluation micro-batches."""
    with float32_products(precision), closing(stage):
        for item in plan.items(start):
            x, labels = stage.load(item)
            if item.kind == "evaluate":
                stage.evaluate(item, x, labels)
            else:
                stage.forward(item, x, labels)
    return scores_of(stage, plan.eval_size, sizes)
