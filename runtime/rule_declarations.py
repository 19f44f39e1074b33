"""What a rule declares, looked at before anything is planned by it."""

from collections.abc import Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from unlocked.rules import Carried, LocalRule, Views

__all__ = ["check_declarations", "check_views"]

_SAMPLES = 2


def check_declarations(rule: LocalRule, name: str, layer: str) -> None:
    """Raises a ValueError that says what a declaration is and what it should be.

    Args:
        name: of the rule.
        layer: its layer's name.
    """
    if problem := _problem(rule):
        raise ValueError(f"the rule {name} of layer {layer} {problem}")


def _problem(rule: LocalRule) -> str:
    carries, receives, optimizer = rule.carries, rule.receives, rule.optimizer
    if not isinstance(carries, Mapping):
        return f"has carries = {carries!r}; it is a dict from names to Carried((sizes of a row's shape))"
    for name, one in carries.items():
        if not isinstance(name, str) or not isinstance(one, Carried) or not _is_shape(one.shape):
            return f"carries {name!r} as {one!r}; write Carried((3, 4)), with positive sizes, for [rows, 3, 4]"
        if not isinstance(one.dtype, torch.dtype):
            return f"carries {name!r} as {one!r}, whose dtype is none of torch's"
    if carries and type(rule).carry is LocalRule.carry:
        return f"carries {', '.join(carries)} but has no method carry(layer_pass) -> dict that gives it"
    if isinstance(receives, str) or not isinstance(receives, Sequence | set | frozenset):
        return f"has receives = {receives!r}; it is a tuple of names, such as {(str(receives),)!r}"
    if not all(isinstance(one, str) for one in receives):
        return f"has receives = {receives!r}; all of them are names"
    if rule.views is not None and not isinstance(rule.views, Views):
        return f"has views = {rule.views!r}; it is an object of a subclass of Views, or None"
    weight = rule.read_out
    if weight is not None and (not isinstance(weight, int | float) or isinstance(weight, bool) or not isfinite(weight)):
        return f"has read_out = {weight!r}; it is the finite weight of its scores, or None"
    if optimizer is not None and optimizer != "layer" and not callable(optimizer):
        return f'has optimizer = {optimizer!r}; it is "layer", None, or what builds an optimizer from parameters'
    return ""


def _is_shape(shape: object) -> bool:
    return isinstance(shape, tuple) and all(type(size) is int and size > 0 for size in shape)


def check_views(views: Views, sample: Tensor, num_classes: int, name: str) -> None:
    """Makes views of made-up samples once.

    Args:
        sample: one of the data.
        name: of the rule.

    Raises:
        ValueError: the data does not give them, or what is made are no rows of such samples.
    """
    if not (views.train >= 1 and views.evaluate >= 1):
        raise ValueError(f"the rule {name} has views {views}; there must be at least one row per sample")
    if not -views.train <= views.probe < views.train or not -views.evaluate <= views.probe < views.evaluate:
        raise ValueError(
            f"the rule {name} has views {views}, of which the output layer shall see number {views.probe}; there are "
            f"{views.train} in training and {views.evaluate} in evaluation"
        )
    samples = sample.expand(_SAMPLES, *sample.shape).clone()
    labels = torch.arange(_SAMPLES) % num_classes
    try:
        views.check(sample, num_classes)
        made = {"make": views.make(samples, labels, lambda count: torch.full((_SAMPLES, count), 0.5), num_classes)}
        made["make_evaluation"] = views.make_evaluation(samples, num_classes)
    except NotImplementedError:
        raise ValueError(
            f"the rule {name} has views of {type(views).__name__}, which has no method make(samples, labels, draw, "
            "num_classes)"
        ) from None
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the rule {name} makes {views.train} views of every sample, which samples of shape {tuple(sample.shape)} "
            f"and type {sample.dtype} don't give: {error}"
        ) from None
    for (method, rows), count in zip(made.items(), (views.train, views.evaluate), strict=True):
        expected = (count * _SAMPLES, *sample.shape)
        if not isinstance(rows, Tensor) or tuple(rows.shape) != expected or rows.dtype != sample.dtype:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(
                f"the rule {name} has views whose {method}() gives {got} of {_SAMPLES} samples; {count} rows each are "
                f"{sample.dtype} {list(expected)}"
            )
