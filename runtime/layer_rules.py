"""Which rule a layer gets, and how it is built: from a class, a configured rule, or any class with a `forward`."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.models.errors import first_line
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.rules import CrossEntropy, LayerInfo, LocalRule, Rule
from unlocked.workers.errors import CalledExitError

__all__ = ["Rules", "choose_rule", "make_rule", "misfit", "rule_name"]

Rules = Rule | Sequence[Rule] | Mapping[str, Rule]
"""One rule for all local layers, one per local layer in order, or by the layer's name. The output layer needs none."""


def choose_rule(infos: Sequence[LayerInfo], index: int, rules: Rules, output_rule: Rule = CrossEntropy) -> Rule:
    """The rule of layer `index`; the last one is the output layer and has `output_rule`.

    Raises:
        ValueError: rules for other layers than there are; names them.
    """
    if index == len(infos) - 1:
        return output_rule
    local = [info.name for info in infos[:-1]]
    if isinstance(rules, Mapping):
        missing, unknown = [n for n in local if n not in rules], [n for n in rules if n not in local]
        if missing or unknown:
            problems = [f"no rule for {', '.join(missing)}"] * bool(missing)
            problems += [f"a rule for {', '.join(map(str, unknown))}"] * bool(unknown)
            raise ValueError(f"{' and '.join(problems)}; the local layers are {', '.join(local) or 'none'}")
        return rules[local[index]]
    if isinstance(rules, Sequence):
        if len(rules) != len(local):
            raise ValueError(f"{len(rules)} rules for {len(local)} local layers; give one or one per layer")
        return rules[index]
    return rules


def make_rule(chosen: Rule, info: LayerInfo) -> LocalRule:
    """Built with a keyed generator, for rules that hold modules with start values.

    Raises:
        ValueError: it can't be built for this layer, or is no rule; names the layer and the rule.
    """
    generators = GlobalGenerators(SOURCES, torch.device("cpu"))
    try:
        with generators.keyed(philox_int(info.seed, Purpose.RULE, info.index, 1)):
            rule: Any = chosen(info) if _takes_a_layer(chosen) else chosen()  # type: ignore[call-arg]
    except (Exception, SystemExit) as error:
        raise misfit(info, chosen, error) from error
    if isinstance(rule, LocalRule):
        return rule
    if isinstance(chosen, type) and callable(getattr(rule, "forward", None)):
        return _Forward(rule)
    raise ValueError(
        f"the rule of layer {info.name} makes a {type(rule).__name__}; give a LocalRule class, a configured rule "
        "such as LLS(), or a function from a LayerInfo to a LocalRule"
    )


def misfit(info: LayerInfo, rule: Rule, error: BaseException) -> ValueError:
    """What to raise where a rule fails for a layer."""
    if isinstance(error, SystemExit):
        error = CalledExitError(error.code)
    return ValueError(
        f"the rule {rule_name(rule)} does not fit layer {info.name} with activations {info.activation_shape} per "
        f"sample and {info.num_classes} classes: {first_line(error)}"
    )


def rule_name(rule: Rule) -> str:
    """What messages call it."""
    while isinstance(rule, partial):
        rule = rule.func
    return str(getattr(rule, "__name__", type(rule).__name__))


class _Forward(LocalRule):
    """A class with nothing but `forward(activations, labels)`, as a rule. A module's parameters are the rule's."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.of = made if isinstance(made, nn.Module) else None
        self._forward = made.__call__ if isinstance(made, nn.Module) else made.forward

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self._forward(activations, labels)
        return loss


def _takes_a_layer(chosen: Rule) -> bool:
    """Whether it is to be called with the `LayerInfo`: all but a class whose constructor takes nothing."""
    if not isinstance(chosen, type):
        return True
    made_by: Any = vars(chosen).get("__init__", getattr(chosen, "__init__", None))
    if made_by in (object.__init__, nn.Module.__init__):
        return False
    try:
        _, *parameters = inspect.signature(made_by).parameters.values()
    except (TypeError, ValueError):
        return True
    places = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(one.kind in places for one in parameters)
