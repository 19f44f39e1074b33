"""What follows a block's body, as far as the kernels may take it over."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from unlocked.models import KeyedDropout
from unlocked.workers.graph.tracing import has_hooks

__all__ = ["Tail", "pool_of", "recognise"]


@dataclass
class Tail:
    """A block's tail that the kernels may take over."""

    pool: str
    size: int
    dropout: nn.Module | None


def recognise(tail: nn.Module) -> Tail | None:
    """A 2x2 pool or an adaptive average, and a dropout after it; None: the tail runs as it is."""
    parts = [module for module in _leaves(tail) if type(module) is not nn.Identity]
    if any(map(has_hooks, tail.modules())):
        return None
    dropout = parts.pop() if parts and isinstance(parts[-1], KeyedDropout) else None
    if isinstance(dropout, KeyedDropout) and dropout.p == 0.0:
        dropout = None
    if not parts:
        return Tail("none", 1, dropout)
    pool = pool_of(parts[0]) if len(parts) == 1 else None
    return None if pool is None else Tail(*pool, dropout)


def _leaves(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        return [module]
    return [leaf for child in module for leaf in _leaves(child)]


def pool_of(pool: nn.Module) -> tuple[str, int] | None:
    """("max", 2), ("mean", 2) or ("average", side), as the kernels know them."""
    kind = type(pool)
    if kind is nn.AdaptiveAvgPool2d and isinstance(pool.output_size, int):
        return "average", pool.output_size
    if kind not in (nn.MaxPool2d, nn.AvgPool2d):
        return None
    plain: dict[str, Any] = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    plain |= {"divisor_override": None}
    sized = all(size in (2, (2, 2)) for size in (pool.kernel_size, pool.stride))
    if not sized or any(getattr(pool, name, value) not in (value, (value, value)) for name, value in plain.items()):
        return None
    return ("max", 2) if kind is nn.MaxPool2d else ("mean", 2)
