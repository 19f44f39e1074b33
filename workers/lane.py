"""A lane: the loop of one stage inside a process that holds all stages, on a stream of its own.

What its actions compute can be captured: F and E of every kind of item, and U, each once for every slot. Waiting for a
slot and recording that it is ready or free stays with the edges, outside of what is captured.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch

from unlocked.workers.actions import Action, Item, ItemKind
from unlocked.workers.captured import Captured
from unlocked.workers.edges import Slot
from unlocked.workers.errors import NonFiniteLossError, StageError
from unlocked.workers.loop import StageLoop
from unlocked.workers.ring import Ring, RingInEdge, RingOutEdge
from unlocked.workers.source import BatchSource
from unlocked.workers.stage import Stage
from unlocked.workers.stamps import Stamp
from unlocked.workers.stopwatch import BUSY, Stopwatch

__all__ = ["Lane"]

_Key = tuple[Literal["forward", "update"], ItemKind, int, int]


class Lane(StageLoop):
    """The loop of a stage between two rings.

    Args:
        entry: the ring that this stage reads; stage 0's is filled by the stage itself, from the dataset.
        exit: the ring of the next stage, or None.
        stream: None on a CPU.
        find_item: the item at a position of the stream, for the errors of captured work.
    """

    def __init__(
        self,
        stage: Stage,
        entry: Ring,
        exit: Ring | None,
        stream: torch.cuda.Stream | None,
        *,
        snapshot: Callable[[Item], None],
        before_item: Callable[[Item], None],
        after_item: Callable[[Item], None],
        stopwatch: Stopwatch,
        find_item: Callable[[int], Item],
    ) -> None:
        super().__init__(
            stage,
            rank=0,
            inbox=None if stage.source is not None else RingInEdge(entry, stream),
            outbox=None if exit is None else RingOutEdge(exit, stream),
            snapshot=snapshot,
            before_item=before_item,
            after_item=after_item,
            stopwatch=stopwatch,
        )
        self.entry, self.exit, self.stream = entry, exit, stream
        self.stamp: Stamp | None = None
        """Is told when an action begins, and when an item is done: where the host's clock can't tell."""
        self.launches = False
        """Whether actions are launched as they were captured."""
        self.offset: int | None = None
        """Set while captured work is called again: what its items' positions are short of the real ones."""
        self.cursor_stays = False
        """Set in work over many ticks: stage 0 reads so many micro-batches after the cursor as an item's position."""
        self._is_warming = False
        self._find_item = find_item
        self._captured: dict[_Key, Captured] = {}
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

    def warm_up(self, item: Item, actions: Sequence[Action]) -> None:
        """The item's actions as they are, so that libraries choose their algorithms and load their kernels. Its numbers
        count for nothing: a loss that is not finite shows, with its place, in the run."""
        self._is_warming = True
        try:
            self.work(item, actions)
        except StageError as error:
            if not isinstance(error.cause, NonFiniteLossError):
                raise
            self._let_go()
        finally:
            self._is_warming = False

    def capture(self, kind: ItemKind, size: int) -> None:
        """Captures what items of this kind and size compute, once for every slot. A warm-up must come before."""
        if self._pool is None and self.stream is not None:
            self._pool = torch.cuda.graph_pool_handle()
        self._set_mode(kind)
        for position in range(self._depth):
            item = Item(position, kind, 0, 0, size, False)
            slot = None if self.exit is None else self.exit.views(item)
            held = self._place_of_input(item, slot)
            self._add(("forward", kind, size, position), partial(self._compute_plainly, item, held, slot))
            if kind == "train":
                self._add(("update", kind, size, position), partial(self.stage.update, item))

    def try_captured(self) -> None:
        """Launches each once, which also uploads it to the device: a failure shows before the run."""
        for (_, kind, *_), captured in self._captured.items():
            self._set_mode(kind)
            with self.uncounted():
                captured.launch()

    def advance(self, steps: int) -> None:
        """Counts training steps that captured work has done."""
        for layer in self.stage.layers:
            layer.advance(steps, on_device=False)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is captured or launched inside is not counted by the host; `advance` does that."""
        before = [layer.uncounted_steps() for layer in self.stage.layers]
        try:
            yield
        finally:
            for layer, steps in zip(self.stage.layers, before, strict=True):
                layer.restore_uncounted(steps)

    def work(self, item: Item, actions: Any) -> None:
        super().work(item, actions)
        self._stamp("end", item)

    def _run_action(self, action: Action, item: Item) -> None:
        if self.offset is not None:  # called again: what is said, and timed, is the real micro-batch
            action = Action(action.stage, action.kind, action.microbatch + self.offset)
        if action.kind in BUSY:
            self._stamp(action.kind.value, item)
        if self.stream is None:
            super()._run_action(action, item)
        else:
            self._guarded(action, item)

    def _located(self, action: Action, item: Item, cause: Exception) -> StageError:
        if self.offset is not None:
            item = self._find_item(item.position + self.offset)
        return super()._located(Action(action.stage, action.kind, item.position), item, cause)

    def _load(self, item: Item, slot: Slot | None) -> Slot:
        """Points the device's cursor at the item, or brings what was assembled on the host into its slot."""
        held, source = self._place_of_input(item, slot), self.stage.source
        if not isinstance(source, BatchSource):
            assert source is not None
            if not self._is_warming:  # data that can't be read again: then whatever lies in the slot will do
                source.load(item, held)
        elif not self.cursor_stays:
            source.seek(item)
        return held

    def _compute(self, item: Item, held: Slot, slot: Slot | None) -> None:
        self._set_mode(item.kind)  # never a part of what is captured: an optimizer may switch its weights here
        if not self._launch(("forward", item.kind, item.size, item.position % self._depth), item):
            self._compute_plainly(item, held, slot)

    def _learn(self, item: Item) -> None:
        if self._launch(("update", item.kind, item.size, item.position % self._depth), item):
            self.advance(1)
        else:
            super()._learn(item)

    def _launch(self, key: _Key, item: Item) -> bool:
        captured = self._captured.get(key) if self.launches else None
        if captured is None:
            return False
        with self.uncounted():
            captured.launch()
        return True

    def _compute_plainly(self, item: Item, held: Slot, slot: Slot | None) -> None:
        source = self.stage.source
        if isinstance(source, BatchSource):
            source.load_at_cursor(item, held, item.position if self.cursor_stays else 0)
        super()._compute(item, held, slot)

    def _place_of_input(self, item: Item, slot: Slot | None) -> Slot:
        """Where the item's input lies. Stage 0's labels are loaded into the slot that it sends, which only this stage
        writes again."""
        x, labels = self.entry.views(item)
        return (x, slot[1]) if self.stage.source is not None and slot is not None else (x, labels)

    def _add(self, key: _Key, work: Callable[[], None]) -> None:
        with self.uncounted():
            # One pool: a stage's captured work never runs at the same time.
            self._captured[key] = Captured(work, self.stream, self._pool)

    def _stamp(self, what: str, item: Item) -> None:
        if self.stamp is not None:
            self.stamp(self.stage.index, what, item.position)

    @property
    def _depth(self) -> int:
        return max(self.entry.depth, self.exit.depth if self.exit else 1)

    def _set_mode(self, kind: ItemKind) -> None:
        for layer in self.stage.layers:
            layer.set_mode(kind)
