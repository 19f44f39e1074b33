"""Work that is issued once and launched many times: a CUDA graph, or on a CPU the same calls made again.

Both see the host's values as they were when the work was captured. What may change between two launches lies in
tensors: the cursor into the data, learning rates, the clock that keys dropout. So a CPU, where a launch is the call
itself, tests that nothing else is read.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Captured", "no_collection"]


class Captured:
    """`work`, ready to be launched.

    Args:
        work: issues everything on `stream` and on streams that it forks off and joins again.
        stream: where it is captured; None on a CPU. Whoever launches it chooses the stream then.
        pool: memory that graphs share which never run at the same time.
    """

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream | None, pool: Any = None) -> None:
        self._work, self._graph = work, None
        if stream is not None:
            self._graph = torch.cuda.CUDAGraph()
            _capture(self._graph, work, stream, pool)

    def launch(self) -> None:
        """On the current stream."""
        if self._graph is not None:
            self._graph.replay()
        else:
            self._work()


def _capture(graph: torch.cuda.CUDAGraph, work: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> None:
    """Waits for the device, then captures. Whatever `work` raises comes out as it is."""
    failure: BaseException | None = None
    try:
        # The outer context puts the current stream back should the capture fail to end. Capturing is local to this
        # thread: CUDA calls of others (a dashboard's, a data reader's) don't break it.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                work()
            except BaseException as error:
                failure = error
    except RuntimeError:
        if failure is None:  # else it is why the capture can't end well
            raise
    if failure is not None:
        raise failure


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected inside: a graph or tensor of an earlier run that is freed during a capture breaks it."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
