"""How far the host may run ahead of a GPU, and the time limit of what the GPU's streams wait for."""

import time
from collections import deque

import torch

from unlocked.workers.errors import LinkLostError

__all__ = ["HostLead"]

_STRIDE = 8  # micro-batches from one event to the next
_EVENTS = 4  # of them that may lie ahead
_POLL_SECONDS = 2e-4


class HostLead:
    """Bounds how many micro-batches the host has issued on an edge before the device has done them.

    The host never waits for a single message: it looks at an event of about 30 micro-batches ago. If that does not
    happen, a stream waits for a neighbour that does not answer. On a CPU, where every message is waited for by itself,
    this does nothing.

    Args:
        device: of the edge's slots.
        timeout: seconds in which an event of before must happen.
        neighbour: for the error.
    """

    def __init__(self, device: torch.device, timeout: float, neighbour: str) -> None:
        self._is_cuda = device.type == "cuda"
        self._timeout, self._neighbour = timeout, neighbour
        self._events: deque[torch.cuda.Event] = deque()
        self._since = 0

    def count(self) -> None:
        """A micro-batch was issued on the current stream.

        Raises:
            LinkLostError: what was issued long ago has not happened in time.
        """
        if not self._is_cuda:
            return
        self._since += 1
        if self._since == _STRIDE:
            self._mark()
            if len(self._events) > _EVENTS:
                self._wait_for(self._events.popleft())

    def wait(self) -> None:
        """Until all that was counted, and all else that the current stream has, is done. Raises as `count`."""
        if self._is_cuda:
            self._mark()
            while self._events:
                self._wait_for(self._events.popleft())

    def _mark(self) -> None:
        self._since = 0
        event = torch.cuda.Event()
        event.record()
        self._events.append(event)

    def _wait_for(self, event: torch.cuda.Event) -> None:
        deadline = time.monotonic() + self._timeout
        while not event.query():
            if time.monotonic() > deadline:
                raise LinkLostError(f"nothing has moved on the link to {self._neighbour} for {self._timeout:g} s")
            time.sleep(_POLL_SECONDS)
