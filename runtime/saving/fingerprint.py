"""Rules, optimizers and rate schedules in one line each: what must not differ between ranks, or on a resume."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor, nn

from unlocked.runtime.learning_rate import LearningRate, PerStep, WarmUp
from unlocked.workers.optimizers import OptimizerFactory, build_optimizer

__all__ = ["describe_lr_factor", "describe_optimizer", "describe_rule", "learning_rates"]

# What an optimizer's group holds besides the settings that a user chose: its parameters, the learning rate (which has
# a line of its own), how fast it computes, and the state that schedule-free optimizers keep there.
_NO_SETTING = {
    *("params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"),
    *("train_mode", "k", "weight_sum", "lr_max", "scheduled_lr"),
}

_FIRST_EPOCHS = 1000  # whose factors are all looked at


def describe_rule(rule: object) -> str | list[str] | dict[str, str]:
    """The rule's name and settings; of several rules, each one's."""
    if isinstance(rule, Mapping):
        return {str(name): _describe(one) for name, one in rule.items()}
    if isinstance(rule, str) or not isinstance(rule, Sequence):
        return _describe(rule)
    return [_describe(one) for one in rule]


def describe_optimizer(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> str:
    """The name and settings, without the learning rate, of the optimizer that `factory` builds for `parameters`.

    Where it makes several groups, each one's settings.
    """
    if not parameters:
        return "none"
    optimizer = build_optimizer(factory, parameters)
    groups = [
        ", ".join(f"{key}={_plain(value)!r}" for key, value in sorted(group.items()) if key not in _NO_SETTING)
        for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def learning_rates(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> list[float]:
    """The initial learning rate of each of the optimizer's groups.

    Raises:
        ValueError: one is not finite.
    """
    rates = [float(group["lr"]) for group in build_optimizer(factory, parameters).param_groups] if parameters else []
    if not all(map(isfinite, rates)):
        raise ValueError(f"the optimizer's learning rate is {rates}; give a finite one")
    return rates


def describe_lr_factor(lr_factor: object, epochs: int) -> str:
    """The schedule's name and settings; of any other function its name and a checksum of its values: of all of them, or
    of the first and of some that are spread over the others where there are many epochs.

    Raises:
        ValueError: a value is no factor; names the epoch.
    """
    if isinstance(lr_factor, WarmUp):
        return f"WarmUp(steps={lr_factor.steps}, then={describe_lr_factor(lr_factor.then, epochs)})"
    if not isinstance(lr_factor, PerStep) and (is_dataclass(lr_factor) or not callable(lr_factor)):
        return repr(lr_factor)
    factor = LearningRate(lr_factor)
    spread = range(_FIRST_EPOCHS, epochs, max(1, epochs // _FIRST_EPOCHS))
    values = repr([float(factor(epoch)) for epoch in (*range(min(epochs, _FIRST_EPOCHS)), *spread)])
    name = f"PerStep of {_name(lr_factor.factor)}" if isinstance(lr_factor, PerStep) else _name(lr_factor)
    return f"{name} with values of checksum {zlib.crc32(values.encode()):08x}"


def _describe(thing: object) -> str:
    if isinstance(thing, str):
        return thing
    if isinstance(thing, partial):
        settings = [repr(value) for value in thing.args]
        settings += [f"{key}={value!r}" for key, value in sorted(thing.keywords.items())]
        return f"{_describe(thing.func)}({', '.join(settings)})"
    if is_dataclass(thing) and not isinstance(thing, type):
        return repr(thing)
    return _name(thing)


def _name(thing: object) -> str:
    """Never an address: it must be the same in every process."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return str(named.__qualname__)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value
