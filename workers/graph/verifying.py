"""Whether a traced body computes what the body itself does: types that a forward() asks for are others while it is
traced, and then so may be what it does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models.errors import first_line
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.workers.graph.autograd import call
from unlocked.workers.graph.expansions import has_expansions
from unlocked.workers.graph.tracing import Node, Untraceable, in_training

__all__ = ["check_same_result"]

_ROUNDING = 1e-4  # of the whole, where sums run in another order


@torch.no_grad()
def check_same_result(
    body: nn.Module, frozen: Sequence[nn.Module], nodes: Sequence[Node], output: Node, sample: Tensor
) -> None:
    """Runs both on `sample`, a micro-batch, and puts back what they count.

    Raises:
        Untraceable: they don't give the same.
    """
    generators = GlobalGenerators(SOURCES, sample.device)
    buffers = [(buffer, buffer.clone()) for buffer in body.buffers()]

    def traced() -> Any:
        values: dict[Node, Any] = {nodes[0]: sample.clone()}
        for node in nodes[1:]:
            values[node] = node.target if isinstance(node.target, Tensor) else call(node, values)
        return values[output]

    found = []
    with in_training(body, frozen):
        for run in (lambda: body(sample.clone()), traced):
            try:
                with generators.keyed(0):
                    found.append(run())
            except Exception as error:
                raise Untraceable(f"it does not run as it was traced: {first_line(error)}") from error
            finally:
                for buffer, value in buffers:
                    buffer.copy_(value)
    if not all(isinstance(one, Tensor) for one in found) or not _are_equal(*found, exactly=not has_expansions(body)):
        raise Untraceable("it does not compute what was traced")


def _are_equal(a: Tensor, b: Tensor, *, exactly: bool) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return torch.equal(a, b) if exactly else bool((a - b).norm() <= _ROUNDING * a.norm())
