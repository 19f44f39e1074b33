"""How a pipeline of backpropagation may be cut: the forms that are tried, so that its best one counts."""

from collections.abc import Sequence
from itertools import combinations

from unlocked.comparison.request import Form, LayerCosts
from unlocked.comparison.rival.pipeline import owner
from unlocked.runtime.schedules.partition import partition

__all__ = ["CHUNKS", "balanced_parts", "forms_to_try"]

CHUNKS = (1, 2, 4, 8)
"""Into which a micro-batch is cut, where nothing else is asked for. One chunk is for GPipe and PipeDream: all others
refuse."""

Parts = tuple[tuple[int, int], ...]


def forms_to_try(
    schedule: str, costs: LayerCosts, *, processes: int, batch_size: int, chunks: Sequence[int] | None
) -> list[Form]:
    """All chunk counts on the split that balances backpropagation's own costs, and on LLS's split where it differs.

    Args:
        chunks: chunk counts, tried as they are; None: those of `CHUNKS` that the schedule may take. PipeDream takes
            micro-batches whole.

    Raises:
        ValueError: the network has fewer layers than the schedule needs stages.
    """
    per_process = 2 if schedule in ("zero-bubble", "ZBV") else 1
    layers, stages = len(costs.backpropagation), per_process * processes
    if stages > layers:
        raise ValueError(
            f"{schedule} holds {per_process} stages per process, {stages} in all, for {layers} layers; "
            "give fewer --processes"
        )
    if per_process == 1:
        splits = [_as_parts(partition(measure, stages)) for measure in (costs.backpropagation, costs.local)]
    else:
        splits = [balanced_parts(costs.backpropagation, schedule, processes)]
    if schedule == "PipeDream":
        chunks = [1]
    elif chunks is None:
        fewest = 1 if schedule == "GPipe" else processes
        chunks = [n for n in CHUNKS if n >= fewest and batch_size % n == 0]
    return [Form(chunks=n, parts=parts) for parts in dict.fromkeys(splits) for n in chunks]


def balanced_parts(costs: Sequence[float], schedule: str, processes: int) -> Parts:
    """Two stages per process, so that the process with the most work has as little as possible; then the others."""
    layers = len(costs)
    found: list[tuple[list[float], Parts]] = []
    for cuts in combinations(range(1, layers), 2 * processes - 1):
        parts = tuple(zip((0, *cuts), (*cuts, layers), strict=True))
        load = [0.0] * processes
        for stage, (start, stop) in enumerate(parts):
            load[owner(stage, schedule, processes)] += sum(costs[start:stop])
        found.append((sorted(load, reverse=True), parts))
    return min(found)[1]


def _as_parts(ranges: Sequence[range]) -> Parts:
    return tuple((part.start, part.stop) for part in ranges)
