"""A 2 x 2 max pool inside a block, on a backend's kernels: it keeps a byte for each window, and not its input."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from unlocked.workers.graph.operations import Gradients, Operation, Pool

__all__ = ["HalvingPool"]


class HalvingPool(Operation):
    """At stride 2, without padding; images that do not lie channels last are the library's.

    Args:
        backend: has `Abilities.pools`.
        library: the same by the library.
    """

    def __init__(self, backend: ModuleType, library: Pool) -> None:
        self._backend, self._library = backend, library
        self._places: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H // 2, W // 2]."""
        lies = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and min(x.shape[2:]) > 1
        if not lies or x.dtype not in (torch.float32, torch.bfloat16):
            return self._library.forward(x)
        self._size = (x.shape[2], x.shape[3])
        y: Tensor
        y, self._places = self._backend.max_pool_forward(x)
        return y

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        if self._places is None:
            return self._library.backward(grad, wanted)
        places, self._places = self._places, None
        return [self._backend.max_pool_backward(grad, places, *self._size)], []
