"""A stage's sums on their way from the device, which nobody waits for."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Transfer"]


class Transfer:
    """Sums on their way from the device: one copy, on the current stream.

    Args:
        sums: of one or more stages, each [3] float64, on `device`.
    """

    @torch.no_grad()
    def __init__(self, sums: Sequence[Tensor], device: torch.device) -> None:
        self._sums = torch.stack(list(sums))
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            host = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            self._sums = host.copy_(self._sums, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def has_come(self, wait: bool) -> bool:
        """Whether it is done; with `wait` it is."""
        if self._event is not None:
            if wait:
                self._event.synchronize()
            elif not self._event.query():
                return False
            self._event = None
        return True

    def rows(self, first: int, count: int) -> list[list[float]]:
        """Once it has come."""
        return self._sums[first : first + count].tolist()
