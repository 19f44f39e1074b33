"""What `Trainer` is given, held to its kind before anything is built; of settings, `fields.check` does that."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from unlocked.models.errors import first_line
from unlocked.rules import GLOBAL_RULES, LocalRule, Task
from unlocked.runtime.learning_rate import ReduceLROnPlateau
from unlocked.workers.optimizers import build_optimizer

_LARGEST_NORM = 3.4e38  # float32's largest number

__all__ = [
    "check_clip",
    "check_lr_factor",
    "check_model",
    "check_names",
    "check_optimizer",
    "check_rule",
    "check_sinks",
    "check_switch",
    "check_task",
    "try_optimizer",
]


def check_model(model: object) -> None:
    """Raises: ValueError if it can't be a network's layers."""
    if not isinstance(model, nn.Module | Sequence) or isinstance(model, str | bytes):
        raise ValueError(
            f"model is {_shown(model)}; give blocks of unlocked.models, an nn.Sequential, or a list of modules"
        )


def check_rule(rule: object) -> None:
    """Raises: ValueError if it is no rule, and no rules of several layers; says how to write one."""
    if isinstance(rule, str):
        if rule not in GLOBAL_RULES:
            valid = " or ".join(map(repr, GLOBAL_RULES))
            raise ValueError(f"rule {rule!r}: give a rule such as LLS(), or {valid}; names: unlocked.rules.get_rule")
        return
    if isinstance(rule, Mapping):
        for name, one in rule.items():
            _check_one_rule(one, f"the rule of layer {name}")
    elif isinstance(rule, Sequence):
        for number, one in enumerate(rule, start=1):
            _check_one_rule(one, f"rule {number}")
    else:
        _check_one_rule(rule, "rule")


def check_optimizer(optimizer: object) -> None:
    """Raises: ValueError if nothing that builds an optimizer, or several by the layers' names."""
    if isinstance(optimizer, Mapping):
        for one in optimizer.values():
            if isinstance(one, Mapping):
                raise ValueError(f"optimizer is {_shown(optimizer)}; give what builds one, by the layer's name")
            check_optimizer(one)
        return
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} that is built already; every layer builds its own: give "
            f"partial(torch.optim.{type(optimizer).__name__}, lr=...)"
        )
    if not callable(optimizer):
        raise ValueError(
            f"optimizer is {_shown(optimizer)}; give what builds one from parameters, such as "
            "partial(torch.optim.Adam, lr=1e-2)"
        )


def try_optimizer(factory: Callable[[Any], Any], parameters: Sequence[nn.Parameter]) -> None:
    """Builds an optimizer that is thrown away.

    Raises:
        ValueError: it can't be built, is no optimizer, steps by a closure alone, or has a setting that is not finite.
    """
    try:
        made = build_optimizer(factory, parameters)
        groups = [dict(group) for group in made.param_groups]
        rates = [float(group["lr"]) for group in groups]
    except Exception as error:
        raise ValueError(f"optimizer {_shown(factory)} builds no optimizer: {first_line(error)}") from error
    if not callable(getattr(made, "step", None)):
        raise ValueError(f"optimizer builds a {type(made).__name__}, which has no step")
    if needed := _needed(made.step):
        raise ValueError(
            f"optimizer {type(made).__name__} can't step without {needed}; a layer steps once for its gradients: take "
            "one that needs nothing more, such as torch.optim.SGD or Adam"
        )
    for group, rate in zip(groups, rates, strict=True):
        for name, value in {**group, "lr": rate}.items():
            parts = value if isinstance(value, tuple | list) else (value,)
            if name != "params" and not all(math.isfinite(part) for part in parts if isinstance(part, float)):
                raise ValueError(f"optimizer {type(made).__name__} has {name} {value}; it must be finite")


def check_lr_factor(schedule: object) -> None:
    """Raises: ValueError if it is no function of the epoch."""
    if isinstance(schedule, type):
        raise ValueError(f"lr_factor is the class {schedule.__name__}; write {schedule.__name__}(...)")
    if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler) or not callable(schedule):
        raise ValueError(
            f"lr_factor is {_shown(schedule)}; give a function from the epoch to a factor of the initial rate, or "
            f"{ReduceLROnPlateau.__name__}(...)"
        )


def check_clip(norm: object) -> None:
    """Raises: ValueError if it is no norm to clip gradients at."""
    number: Any = norm
    good = isinstance(norm, Real) and not isinstance(norm, bool) and bool(0 < number <= _LARGEST_NORM)
    if norm is not None and not good:
        raise ValueError(f"clip_grad_norm is {norm!r}; it must be a positive number that float32 can hold, or None")


def check_task(task: object) -> None:
    """Raises: ValueError if it is no task."""
    if task is not None and not isinstance(task, Task):
        kind = task.__name__ if isinstance(task, type) else None
        advice = f"write {kind}()" if kind else "give one such as unlocked.rules.Tokens(), or None"
        raise ValueError(f"task is {_shown(task)}; {advice}")


def check_sinks(sinks: object) -> None:
    """Raises: ValueError if neither a list of metrics sinks nor what makes one."""
    if isinstance(sinks, type) or not (callable(sinks) or _are_sinks(sinks)):
        raise ValueError(f"sinks is {_shown(sinks)}; give a list of MetricsSink objects, or a function that makes one")


def check_names(names: object) -> None:
    """Raises: ValueError if no mapping of strings."""
    good = isinstance(names, Mapping) and all(isinstance(text, str) for pair in names.items() for text in pair)
    if good and isinstance(names, Mapping):
        good = set(names) <= {"model", "dataset", "rule"}
    if names is not None and not good:
        raise ValueError(f"names is {_shown(names)}; give strings by the keys model, dataset and rule, or None")


def _check_one_rule(rule: object, where: str) -> None:
    advice = "give a rule such as LLS(), or a LocalRule class"
    if isinstance(rule, type):
        bases = [base for base in rule.__mro__[:-1] if base is not nn.Module]
        if not issubclass(rule, LocalRule) and any("__call__" in vars(base) for base in bases):
            raise ValueError(f"{where} is the class {rule.__name__}; write {rule.__name__}()")
    elif isinstance(rule, LocalRule):
        raise ValueError(
            f"{where} is a {type(rule).__name__} that is built already; every layer builds its own: give its class"
        )
    elif isinstance(rule, nn.Module) or not callable(rule):
        raise ValueError(f"{where} is {_shown(rule)}; {advice}")


def _needed(function: Callable[..., Any]) -> str:
    """The arguments that it can't do without, by name."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(one.name for one in arguments if one.default is one.empty and one.kind not in optional)


def _are_sinks(sinks: object) -> bool:
    return isinstance(sinks, Sequence) and all(
        not isinstance(sink, type) and callable(getattr(sink, "on_start", None)) for sink in sinks
    )


def _shown(value: object) -> str:
    """A value in an error's one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def check_switch(name: str, value: object, *, or_none: bool = False) -> None:
    """Raises a ValueError unless it is True or False, or None where that is a choice."""
    if not (isinstance(value, bool) or (or_none and value is None)):
        raise ValueError(f"{name} is {value!r}; it must be True{', False or None' if or_none else ' or False'}")
