"""Which optimizer a layer gets: the same kind for all, or one by the layer's name; and gradient clipping."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from unlocked.workers.optimizers import OptimizerFactory

__all__ = ["Optimizers", "check_layers", "clipped", "optimizer_for"]

Optimizers = OptimizerFactory | Mapping[str, OptimizerFactory]
"""Builds every layer's optimizer, or by the layer's name (the output layer included; layers without parameters may be
left out)."""


def optimizer_for(optimizers: Optimizers, layer: str) -> OptimizerFactory:
    """What builds the optimizer of that layer. Of one that was left out: what says so, if there are parameters."""
    if not isinstance(optimizers, Mapping):
        return optimizers
    return optimizers[layer] if layer in optimizers else _none_for(layer)


def _none_for(layer: str) -> OptimizerFactory:
    def build(parameters: Any) -> torch.optim.Optimizer:
        raise ValueError(f"no optimizer for {layer}, whose rule trains parameters; give one by its name")

    return build


def check_layers(optimizers: Optimizers, layers: Sequence[str], blocks: Sequence[nn.Module]) -> None:
    """Raises: ValueError: optimizers for other layers than there are, or none for one with parameters; names them."""
    if not isinstance(optimizers, Mapping):
        return
    trained = [name for name, block in zip(layers, blocks, strict=True) if any(True for _ in block.parameters())]
    missing, unknown = [n for n in trained if n not in optimizers], [n for n in optimizers if n not in layers]
    if missing or unknown:
        problems = [f"no optimizer for {', '.join(missing)}"] * bool(missing)
        problems += [f"an optimizer for {', '.join(map(str, unknown))}"] * bool(unknown)
        raise ValueError(f"{' and '.join(problems)}; the layers are {', '.join(layers)}")


def clipped(factory: OptimizerFactory, largest_norm: float | None) -> OptimizerFactory:
    """The same optimizers, before whose steps the gradients of the layer are scaled down to a norm of `largest_norm`,
    where it is larger: torch's `clip_grad_norm_`, layer by layer. None: as they are.

    Hooks are what fused optimizers leave to the library, so a clipped layer steps by torch's own.
    """
    if largest_norm is None:
        return factory

    def build(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: Any = factory(parameters)

        def clip(*_: object) -> None:
            torch.nn.utils.clip_grad_norm_(parameters, largest_norm)

        optimizer.register_step_pre_hook(clip)
        made: torch.optim.Optimizer = optimizer
        return made

    return build
