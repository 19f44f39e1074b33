"""Counters by which the programs of one launch find out which of them is the last.

A counter is zero before a launch and set back to zero by it, so none has to be cleared between launches. Two launches
that may run at the same time must not share one. So eager launches take turns through far more counters than can be
under way at once, and every launch recorded in a CUDA graph, which may be replayed at any later time, keeps one of its
own for good.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["arrival_counter"]

_EAGER_COUNTERS = 8192  # a stream holds about a thousand launches before it makes the host wait
_GRAPH_COUNTERS = 8192
_ALIGNMENT = 4  # int32 per counter, so that each is 16-byte aligned and no kernel is compiled twice


def arrival_counter(device: torch.device) -> Tensor:
    """A zeroed int32 counter [4] (the first is used) for one launch on the current stream of `device`."""
    if device.type != "cuda":
        return torch.zeros(_ALIGNMENT, dtype=torch.int32, device=device)
    pool = _pools.get(device)
    if not torch.cuda.is_current_stream_capturing():
        eager, _ = pool if pool is not None else _make_pool(device)
        return next(eager)
    counter = None if pool is None else next(pool[1], None)
    if counter is not None:
        return counter
    # No pool yet, or all given away: a counter in the graph's own memory, cleared by a node of the graph.
    return torch.zeros(_ALIGNMENT, dtype=torch.int32, device=device)


# Per device: counters for eager launches, in turn for ever; counters for graphs, each once. Threads share them: next()
# on either is one step of the interpreter.
_Pool = tuple[Iterator[Tensor], Iterator[Tensor]]
_pools: dict[torch.device, _Pool] = {}


def _make_pool(device: torch.device) -> _Pool:
    counters = torch.zeros((_EAGER_COUNTERS + _GRAPH_COUNTERS, _ALIGNMENT), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # once per device: other streams will use them too
    views = counters.unbind(0)
    # Should two threads get here at once, the first to arrive wins and the other's counters are dropped.
    return _pools.setdefault(device, (itertools.cycle(views[:_EAGER_COUNTERS]), iter(views[_EAGER_COUNTERS:])))
