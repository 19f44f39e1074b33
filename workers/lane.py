"""A lane: one stage inside a process that holds all stages, with its stream and its two rings."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from unlocked.workers.actions import Item
from unlocked.workers.layer import AutogradStep
from unlocked.workers.ring import Ring
from unlocked.workers.source import BatchSource
from unlocked.workers.stage import Stage

__all__ = ["Lane"]

Mark = Callable[[int, str, Item], None]
"""Called around actions as mark(stage, "F" | "U" | "E" | "end", item): a trace records an event there."""


class Lane:
    """Issues one stage's actions for an item, on the stage's own stream.

    Args:
        inbox: the ring this stage reads; stage 0's is filled by the stage itself, from the dataset.
        outbox: the ring of the next stage, or None.
    """

    def __init__(self, stage: Stage, inbox: Ring, outbox: Ring | None, device: torch.device) -> None:
        self.stage, self.inbox, self.outbox = stage, inbox, outbox
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph] = {}
        self._seen: set[tuple[Any, ...]] = set()
        self._pool: Any = None

    @property
    def is_capturable(self) -> bool:
        return all(layer.is_capturable for layer in self.stage.layers)

    @property
    def runs_autograd(self) -> bool:
        return any(isinstance(layer.step, AutogradStep) for layer in self.stage.layers)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Everything inside is issued to the lane's stream."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def issue(self, item: Item, *, graphs: bool, mark: Mark | None = None) -> None:
        """The item's actions with the waits that its slots need. Call within `on_stream`.

        With `graphs`, an item like one that was issued before is captured, and replayed from then on.
        """
        if item.kind == "snapshot":
            return
        self._wait(item)
        self._feed(item)
        if graphs and self.stream is not None:
            self._replay(item)
            self._record_ready(item)
        else:
            self.compute(item, self._record_ready, mark)
        self._record_free(item)

    def issue_in_block(self, item: Item, ahead: int, mark: Mark | None = None) -> None:
        """The same inside a graph over several ticks: `ahead` micro-batches after the device's cursor."""
        self._wait(item)
        self.compute(item, self._record_ready, mark, ahead)
        self._record_free(item)

    def compute(self, item: Item, sent: Callable[[Item], None], mark: Mark | None = None, ahead: int = 0) -> None:
        """The item's actions and nothing else; `sent` is called when the output is written (before the update)."""
        stage, outbox = self.stage, self.outbox
        x, labels = self.inbox.views(item)
        _call(mark, stage.index, "E" if item.kind == "evaluate" else "F", item)
        out = None
        if outbox is not None:
            out, out_labels = outbox.views(item)
            if isinstance(stage.source, BatchSource):
                labels = out_labels  # loaded into the next edge's slot, which only this stage writes again
            else:
                out_labels.copy_(labels)
        if isinstance(stage.source, BatchSource):
            stage.source.load_at_cursor(item, (x, labels), ahead)
        if item.kind == "evaluate":
            stage.evaluate(item, x, labels, out)
        else:
            stage.forward(item, x, labels, out)
        sent(item)
        if item.kind == "train":
            _call(mark, stage.index, "U", item)
            stage.update(item)
        _call(mark, stage.index, "end", item)

    def advance(self, steps: int) -> None:
        """Counts training steps that a graph has done."""
        for layer in self.stage.layers:
            layer.advance(steps, on_device=False)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is captured inside does not count as done."""
        before = [layer.uncounted_steps() for layer in self.stage.layers]
        yield
        for layer, steps in zip(self.stage.layers, before, strict=True):
            layer.restore_uncounted(steps)

    def _feed(self, item: Item) -> None:
        """Stage 0: points the device's cursor at the item, or brings what was assembled on the host into its slot."""
        source = self.stage.source
        if isinstance(source, BatchSource):
            source.seek(item)
        elif source is not None:
            source.load(item, self.inbox.views(item))

    def _replay(self, item: Item) -> None:
        depth = max(self.inbox.depth, self.outbox.depth if self.outbox else 1)
        key = (item.kind, item.size, item.position % depth)
        if (item.kind, item.size) not in self._seen:
            # The first of its shape runs as it is: libraries choose their algorithms, kernels are loaded.
            self._seen.add((item.kind, item.size))
            self.compute(item, _nothing)
            return
        for layer in self.stage.layers:  # outside of the graph: an optimizer may switch its weights here
            layer.set_mode(item.kind)
        if key not in self._graphs:
            self._graphs[key] = self._capture(item)
        self._graphs[key].replay()
        if item.kind == "train":
            self.advance(1)

    def _capture(self, item: Item) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Capturing is local to this thread: the CUDA calls of other threads must not break it. The stage's graphs
        # share a pool, since they never run at the same time.
        with (
            self.uncounted(),
            torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            self.compute(item, _nothing)
        self._pool = graph.pool()
        return graph

    def _wait(self, item: Item) -> None:
        if self.stream is None:
            return
        waits = [self.inbox.ready[self.inbox.slot(item.position)]]
        if self.outbox is not None:
            waits.append(self.outbox.free[self.outbox.slot(item.position)])
        for event in waits:
            if event is not None:
                self.stream.wait_event(event)

    def _record_free(self, item: Item) -> None:
        self._record(self.inbox.free, self.inbox.slot(item.position))

    def _record_ready(self, item: Item) -> None:
        if self.outbox is not None:
            self._record(self.outbox.ready, self.outbox.slot(item.position))

    def _record(self, events: list[torch.cuda.Event | None], slot: int) -> None:
        if self.stream is not None:
            events[slot] = torch.cuda.Event()
            events[slot].record(self.stream)  # type: ignore[union-attr]


def _nothing(item: Item) -> None:
    pass


def _call(mark: Mark | None, stage: int, what: str, item: Item) -> None:
    if mark is not None:
        mark(stage, what, item)
