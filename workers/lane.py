"""A lane: one stage inside a process that holds all stages, with its stream and its two rings."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from unlocked.workers.actions import Item, MarkKind
from unlocked.workers.recording import Recording
from unlocked.workers.ring import Ring
from unlocked.workers.source import BatchSource
from unlocked.workers.stage import Stage
from unlocked.workers.stamps import Mark

__all__ = ["Lane"]


class Lane:
    """Issues one stage's actions for an item, on the stage's own stream.

    Args:
        inbox: the ring this stage reads; stage 0's is filled by the stage itself, from the dataset.
        outbox: the ring of the next stage, or None.
        stream: None on a CPU.
    """

    def __init__(self, stage: Stage, inbox: Ring, outbox: Ring | None, stream: torch.cuda.Stream | None) -> None:
        self.stage, self.inbox, self.outbox, self.stream = stage, inbox, outbox, stream
        self.mark: Mark | None = None
        """Is told of every action, if there is one."""
        self.offset = 0
        """What a replayed item's position is short of the real one."""
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self._pool: Any = None

    @property
    def is_capturable(self) -> bool:
        return all(layer.is_capturable for layer in self.stage.layers)

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Everything inside is issued to the lane's stream."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def issue(self, item: Item, *, recorded: bool) -> None:
        """The item's actions with the waits that its slots need. Call within `on_stream`.

        With `recorded`, from the recording of items like this one, if there is one.
        """
        if item.kind == "snapshot":
            return
        self._wait(item)
        self._feed(item)
        recording = self._recordings.get(self._key(item)) if recorded else None
        if recording is None:
            self.compute(item, self._record_ready)
        else:
            self._replay(recording, item)
            self._record_ready(item)
        self._record_free(item)

    def issue_in_block(self, item: Item, ahead: int) -> None:
        """The same as a part of a recording over several ticks: `ahead` micro-batches after the device's cursor."""
        self._wait(item)
        self.compute(item, self._record_ready, ahead)
        self._record_free(item)

    def warm_up(self, item: Item) -> None:
        """The item's actions as they are, so that libraries choose their algorithms and load their kernels. Without
        data that can be read again, on whatever lies in the slot."""
        if isinstance(self.stage.source, BatchSource):
            self.stage.source.seek(item)
        self.compute(item, _nothing)

    def record(self, kind: MarkKind, size: int) -> None:
        """Makes recordings for items of this kind and size, one for every slot. A warm-up must come before."""
        if self._pool is None and self.stream is not None:
            self._pool = torch.cuda.graph_pool_handle()
        self._set_mode(kind)
        for position in range(self._depth):
            item = Item(position, kind, 0, 0, size, False)
            with self.uncounted():
                # One pool: a stage's recordings never run at the same time.
                recording = Recording(partial(self.compute, item, _nothing), self.stream, self._pool)
            self._recordings[self._key(item)] = recording

    def try_recordings(self) -> None:
        """Replays each once, which also uploads it to the device: a failure shows before the run."""
        for (kind, *_), recording in self._recordings.items():
            self._set_mode(kind)
            with self.uncounted():
                recording.replay()

    def compute(self, item: Item, sent: Callable[[Item], None], ahead: int = 0) -> None:
        """The item's actions and nothing else; `sent` is called when the output is written (before the update)."""
        stage, outbox = self.stage, self.outbox
        x, labels = self.inbox.views(item)
        self.tell("E" if item.kind == "evaluate" else "F", item)
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
            self.tell("U", item)
            stage.update(item)
        self.tell("end", item)

    def tell(self, what: str, item: Item) -> None:
        """Marks that an action of `item` begins, or that the last one ends."""
        if self.mark is not None:
            self.mark(self.stage.index, what, item.position + self.offset)

    def advance(self, steps: int) -> None:
        """Counts training steps that a recording has done."""
        for layer in self.stage.layers:
            layer.advance(steps, on_device=False)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is recorded or replayed inside is not counted by the host; `advance` does that."""
        before = [layer.uncounted_steps() for layer in self.stage.layers]
        try:
            yield
        finally:
            for layer, steps in zip(self.stage.layers, before, strict=True):
                layer.restore_uncounted(steps)

    @property
    def _depth(self) -> int:
        return max(self.inbox.depth, self.outbox.depth if self.outbox else 1)

    def _key(self, item: Item) -> tuple[Any, ...]:
        return (item.kind, item.size, item.position % self._depth)

    def _set_mode(self, kind: MarkKind) -> None:
        for layer in self.stage.layers:
            layer.set_mode(kind)

    def _feed(self, item: Item) -> None:
        """Stage 0: points the device's cursor at the item, or brings what was assembled on the host into its slot."""
        source = self.stage.source
        if isinstance(source, BatchSource):
            source.seek(item)
        elif source is not None:
            source.load(item, self.inbox.views(item))

    def _replay(self, recording: Recording, item: Item) -> None:
        self._set_mode(item.kind)  # not a part of the recording: an optimizer may switch its weights here
        on_device = self.stream is not None
        if on_device:  # a graph holds no marks, a repeated call makes its own
            self.tell("E" if item.kind == "evaluate" else "F", item)
        self.offset = item.position - item.position % self._depth
        try:
            with self.uncounted():
                recording.replay()
        finally:
            self.offset = 0
        if on_device:
            self.tell("end", item)
        if item.kind == "train":
            self.advance(1)

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
            event = torch.cuda.Event()
            event.record(self.stream)
            events[slot] = event


def _nothing(item: Item) -> None:
    pass
