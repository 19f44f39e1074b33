"""What a block writes into of what it is given, found before training by a trial.

An in-place operation at a block's beginning (`LeakyReLU(inplace=True)`, `x.add_()` in someone's forward) would change
an edge's slot, which is read again after a crash, and what the rule of the layer before has yet to read.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.models.blocks import Block
from unlocked.models.chance import is_known
from unlocked.models.dropout import set_dropout_keys
from unlocked.models.generators import SOURCES, GlobalGenerators

__all__ = ["Writes", "find_writes"]

_KEY = 0x5EED  # of a trial's draws; any
_CPU = torch.device("cpu")


class Writes(NamedTuple):
    """What a block writes into. Where it does, its layer gives it a copy."""

    input: bool = False
    """Its input, in any mode."""
    beside: frozenset[str] = frozenset()
    """The named tensors beside that."""
    activations: bool = False
    """Its tail: what the body has made, which the rule is to see."""


def find_writes(
    block: Block, make_input: Callable[[], Tensor], beside: Mapping[str, Tensor] = MappingProxyType({})
) -> Writes:
    """What the block writes into, in training, in statistics or in evaluation.

    Blocks of torch's and the project's own modules, none of them in place, write into nothing. A copy of any other is
    run on the CPU; should it not run there, it is taken to write into everything, which costs copies and no more.

    Args:
        make_input: a micro-batch to try it with, on the CPU.
        beside: the tensors that the block reads beside it, by name.
    """
    if all(is_known(module) and not getattr(module, "inplace", False) for module in block.modules()):
        return Writes()
    generators = GlobalGenerators(SOURCES, _CPU)
    try:
        tried = block.copy().to(_CPU)
        set_dropout_keys(tried, 0, 0, 0)
        with generators.keyed(_KEY):
            inputs, named, activations = zip(*_modes(tried, make_input(), beside), strict=True)
        return Writes(any(inputs), frozenset().union(*named), any(activations))
    except Exception:
        return Writes(input=True, beside=frozenset(beside), activations=True)


def _modes(block: Block, x: Tensor, beside: Mapping[str, Tensor]) -> Iterator[Writes]:
    """A forward of training, of statistics, of evaluation."""
    for is_training, has_gradients in ((True, True), (True, False), (False, False)):
        block.train(is_training)
        with torch.set_grad_enabled(has_gradients):
            yield _run(block, x, beside)


def _run(block: Block, x: Tensor, beside: Mapping[str, Tensor]) -> Writes:
    given = {"": x.clone(), **{name: value.clone() for name, value in beside.items()}}
    watched = {name: _Watched(value) for name, value in given.items()}
    activations = block.body(given.pop(""), **given).detach()
    made = _Watched(activations)
    block.tail(activations)
    changed = {name for name, one in watched.items() if one.has_changed()}
    return Writes("" in changed, frozenset(changed - {""}), made.has_changed())


class _Watched:
    """A tensor that may be written into: seen by its version, or, past that (`x.data`, `x.numpy()`), by its values."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._version, self._before = value, value._version, value.detach().clone()

    def has_changed(self) -> bool:
        value: Any = self._value.detach()
        same = (value == self._before) | ((value != value) & (self._before != self._before))
        return self._value._version != self._version or not bool(same.all())
