"""Every layer's rule is tried once before a run: what does not fit is said before the first step."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.rules import (
    CLASS_NUMBER,
    TASKS,
    CrossEntropy,
    LayerInfo,
    LocalRule,
    Rule,
    TaskLoss,
    Views,
    has_scores,
    needs_pass,
)
from unlocked.runtime.batch_statistics import RuleStatistics
from unlocked.runtime.layer_optimizers import Optimizers, optimizer_for
from unlocked.runtime.layer_rules import Rules, choose_rule, make_rule, misfit, rule_name
from unlocked.runtime.network import Network, optimizer_of
from unlocked.runtime.side_channel import SideChannel, plan_side_channel
from unlocked.workers.errors import NonFiniteWeightsError
from unlocked.workers.finite import FiniteState
from unlocked.workers.optimizers import OptimizerFactory
from unlocked.workers.pass_layer import PassLayer

__all__ = ["check_rules", "check_trainable"]

_SAMPLES = 2


def check_rules(
    network: Network,
    rules: Rules,
    *,
    output_rule: Rule = CrossEntropy,
    optimizer: Optimizers | None = None,
    sample: Tensor | None = None,
) -> Network:
    """Builds every layer's rule and takes it through a step with made-up samples, so that what doesn't fit is said
    before training starts. What is built is thrown away, and the global random states are left as they were.

    Args:
        optimizer: the run's, for rules that take whole passes.
        sample: one sample of the data; None: zeros.

    Returns:
        The network, whose layers also draw from what their rules were seen to draw from, with its side channel and the
        normalisations in its rules.

    Raises:
        ValueError: rules for other layers than there are, or a rule that doesn't fit its layer; names the layer, the
            rule and the activations' shape.
    """
    generators = GlobalGenerators(SOURCES, torch.device("cpu"))
    if network.task.name != "classification" and output_rule is CrossEntropy:
        output_rule = TaskLoss
    chosen = [choose_rule(network.infos, index, rules, output_rule) for index in range(len(network.infos))]
    built = [make_rule(one, info) for one, info in zip(chosen, network.infos, strict=True)]
    if sample is None:
        sample = torch.zeros(network.input_shape, dtype=network.input_dtype)
    names = [rule_name(one) for one in chosen]
    for one, rule, info in zip(names, built, network.infos, strict=True):
        check_task(one, rule, info)
    channel = plan_side_channel(network.infos, built, names, sample, network.side_channel.inputs)
    draws = []
    statistics = list(network.batch_statistics)
    carried: dict[str, Tensor] = {}  # what the layers before have sent
    for index, (info, rule) in enumerate(zip(network.infos, built, strict=True)):
        with generators.keyed(info.seed):
            before = generators.states()
            takes_pass = needs_pass(rule)
            with RuleStatistics(info.name, rule, _samples(network, info) if takes_pass else _SAMPLES) as seen:
                if takes_pass:
                    factory = torch.optim.SGD if optimizer is None else optimizer_for(optimizer, info.name)
                    carried = _try_pass(network, index, rule, chosen[index], channel, carried, factory)
                else:
                    activations = torch.randn(_SAMPLES, *info.activation_shape, requires_grad=True)
                    before = generators.states()
                    _try_rule(rule, activations, network.target.made_up(_SAMPLES), chosen[index], info)
            statistics += seen.found
            if has_scores(rule):
                _try_scores(rule, chosen[index], info, channel.views if index < len(built) - 1 else None)
            draws.append(network.draws[index] | generators.moved(before))
    last = network.infos[-1]
    scored = tuple(i.name for i, rule in zip(network.infos, built, strict=True) if has_scores(rule) or i is last)
    return replace(
        network,
        draws=draws,
        side_channel=channel,
        scored=scored,
        passes=any(map(needs_pass, built)),
        batch_statistics=statistics,
    )


def check_trainable(network: Network, rules: Rules | str) -> None:
    """Raises a ValueError that names the layers if none of them has anything to train.

    Args:
        rules: the local rules, whose own parameters count; or the name of a global one, which has none.
    """
    parameters = [p for block in network.blocks for p in block.parameters()]
    if any(p.requires_grad for p in parameters):
        return
    if not isinstance(rules, str):
        with torch.random.fork_rng(devices=[]):
            made = [make_rule(choose_rule(network.infos, i, rules), info) for i, info in enumerate(network.infos)]
        if any(p.requires_grad for rule in made for p in rule.parameters()):
            return
    problem = "all their parameters are frozen (requires_grad=False)" if parameters else "they have no parameters"
    raise ValueError(f"no layer has anything to train: {', '.join(network.names)}; {problem}")


def check_task(name: str, rule: LocalRule, info: LayerInfo) -> None:
    """Raises: ValueError: the rule does not take the targets of the run's task."""
    kind = info.task.name if info.task.name in TASKS else "own"
    if rule.takes is not None and kind not in rule.takes:
        raise ValueError(
            f"the rule {name} of layer {info.name} takes the targets of {', '.join(rule.takes)}, not of the task "
            f"{info.task.name}; LLS, LocalLosses and DGL take those of all tasks of the library"
        )


def _try_rule(rule: LocalRule, activations: Tensor, targets: Tensor, chosen: Rule, info: LayerInfo) -> None:
    depends = False
    state = FiniteState(info.name, {"rule": rule})
    try:
        with torch.enable_grad():
            loss = rule(activations, targets)
            if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
                depends = torch.autograd.grad(loss, activations, allow_unused=True)[0] is not None
    except (Exception, SystemExit) as error:
        raise misfit(info, chosen, error) from error
    _check_loss(loss, chosen, info)
    _check_state(state, chosen)
    if not depends:
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} gives a loss that does not depend on the activations, "
            "so the layer can't learn from it"
        )


def _try_pass(
    network: Network,
    index: int,
    rule: LocalRule,
    chosen: Rule,
    channel: SideChannel,
    carried: dict[str, Tensor],
    optimizer: OptimizerFactory,
) -> dict[str, Tensor]:
    """A training step of a copy of the layer on made-up samples; what is on the side channel after it."""
    info = network.infos[index]
    samples = _samples(network, info)
    rows = channel.rows(index, samples)
    shape = network.output_shapes[index - 1] if index else network.input_shape
    x = torch.zeros(rows, *shape, dtype=torch.int64)
    if index or network.input_dtype.is_floating_point:
        x = torch.randn(rows, *shape, generator=_generator(info))
    factory = optimizer_of(rule, optimizer)
    options: dict[str, Any] = {"device": torch.device("cpu"), "sums": network.num_sums, "writes": network.writes[index]}
    layer = PassLayer(network.blocks[index].copy(), rule, info, factory, sources=(), **options)
    layer.beside = network.beside_of(index, rows)
    before = {name: value.clone() for name, value in _learned(layer)}
    try:
        labels = network.target.made_up(samples)
        if network.target == CLASS_NUMBER:
            labels = torch.arange(samples) % info.num_classes
        arriving = {name: carried[name] for name in channel.arriving(index)}
        layer.begin(0, labels, arriving)
        layer.forward(x)
        carried = {**carried, **layer.carry()}
        loss = layer.step.update(labels)
    except (Exception, SystemExit) as error:
        raise misfit(info, chosen, error) from error
    _check_loss(loss, chosen, info)
    try:
        layer.finite.check()
    except NonFiniteWeightsError as error:
        raise ValueError(
            f"the rule {rule_name(chosen)} leaves values that are not finite after one step on made-up samples: {error}"
        ) from error
    idle = bool(layer.parameters) and all(p.grad is None for p in layer.parameters)
    if idle and all(torch.equal(before[name], value) for name, value in _learned(layer)):
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} changes nothing in a step: it returns a loss without a "
            "graph, sets no gradients, and leaves weights and buffers as they are"
        )
    return carried


def _learned(layer: PassLayer) -> Iterator[tuple[str, Tensor]]:
    """What a rule may change: the weights, and whatever it keeps; not the statistics that a forward pass counts."""
    yield from layer.block.named_parameters(prefix="block")
    yield from layer.rule.state_dict().items()


def _try_scores(rule: LocalRule, chosen: Rule, info: LayerInfo, views: Views | None) -> None:
    rows = _SAMPLES * (1 if views is None else views.evaluate)
    try:
        with torch.no_grad():
            scores = rule.scores(torch.randn(rows, *info.activation_shape, generator=_generator(info)))
    except (Exception, SystemExit) as error:
        raise misfit(info, chosen, error) from error
    fits = isinstance(scores, Tensor) and tuple(scores.shape)[-1:] == (info.num_classes,) and scores.dim() == 2
    if not fits or (len(scores) != _SAMPLES and not info.task.dense):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} gives scores of {got} for {_SAMPLES} samples; they "
            f"must be [B, {info.num_classes}]"
        )


def _samples(network: Network, info: LayerInfo) -> int:
    """With a label of every class, where labels are classes."""
    return max(_SAMPLES, info.num_classes) if network.target == CLASS_NUMBER else _SAMPLES


def _generator(info: LayerInfo) -> torch.Generator:
    """For made-up samples: the global ones must not move, or the rule would seem to draw."""
    return torch.Generator().manual_seed(info.index)


def _check_state(state: FiniteState, chosen: Rule) -> None:
    try:
        state.check()
    except NonFiniteWeightsError as error:
        raise ValueError(
            f"the rule {rule_name(chosen)} leaves values that are not finite after one step on made-up samples: {error}"
        ) from error


def _check_loss(loss: object, chosen: Rule, info: LayerInfo) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"the rule {rule_name(chosen)} of layer {info.name} gives a loss of {got}; it must be a scalar "
            "tensor, the mean over the micro-batch"
        )
