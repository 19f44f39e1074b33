"""Building a layer's optimizer, without the second that torch takes for it the first time."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["OptimizerFactory", "build_optimizer"]

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_KNOWN = "__dynamo_disable"  # where torch._compile._disable_dynamo keeps what it found out, on the function itself


def build_optimizer(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> Any:
    """What `factory` makes of the parameters.

    The first torch optimizer of a process imports torch's compiler, a third of a short run's start, only to tell it not
    to look into `add_param_group`. Nobody compiles that here. A step of torch's own imports it all the same; the fused
    ones of this project do without.
    """
    with _without_compiler():
        return factory(list(parameters))


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    method: Any = torch.optim.Optimizer.add_param_group
    bare = getattr(method, "__wrapped__", None)
    if "torch._dynamo" in sys.modules or bare is None or hasattr(bare, _KNOWN):
        yield
        return
    setattr(bare, _KNOWN, bare)
    try:
        yield
    finally:
        delattr(bare, _KNOWN)
