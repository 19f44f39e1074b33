"""The loop that executes a stage's actions. It has no plan of its own: what happens when is the schedule's."""

import time
from collections.abc import Callable, Iterable

from torch import Tensor

from unlocked.workers.actions import Action, ActionKind, Item
from unlocked.workers.edges import InEdge, OutEdge
from unlocked.workers.errors import StageError, StopRun
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Recorder

__all__ = ["StageLoop"]


class StageLoop:
    """Executes actions on one stage.

    Args:
        stage: the layers.
        rank: for messages.
        inbox, outbox: the edges; None at the ends of the pipeline (stage 0 reads the dataset instead).
        snapshot: called for SNAP.
        before_item, after_item: called around everything that a stage does for an item of the stream.
        recorder: adds up busy and waiting times.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        rank: int,
        inbox: InEdge | None,
        outbox: OutEdge | None,
        snapshot: Callable[[Item], None],
        before_item: Callable[[Item], None],
        after_item: Callable[[Item], None],
        recorder: Recorder,
    ) -> None:
        self.stage, self.rank, self.inbox, self.outbox = stage, rank, inbox, outbox
        self.recorder = recorder
        self._snapshot, self._before_item, self._after_item = snapshot, before_item, after_item
        self._held: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None
        self._execute = {
            ActionKind.RECV: self._receive,
            ActionKind.F: self._forward,
            ActionKind.E: self._evaluate,
            ActionKind.U: lambda item: self.stage.update(item),
            ActionKind.SEND: self._send,
            ActionKind.SNAP: lambda item: self._snapshot(item),
        }

    def run(self, items: Iterable[Item], actions: Iterable[Action]) -> None:
        """Executes the actions of `items`, in order.

        Raises:
            StageError: names rank, stage, layers and action, with the cause chained.
        """
        todo = {item.position: item for item in items}
        if self.inbox is not None:
            self.inbox.expect(item for item in todo.values() if item.kind != "snapshot")
        previous: Item | None = None
        for action in actions:
            item = todo[action.microbatch]
            if item is not previous:
                if previous is not None:
                    self._finish(previous)
                self._before_item(item)
            previous = item
            self._run_action(action, item)
        if previous is not None:
            self._finish(previous)

    def _run_action(self, action: Action, item: Item) -> None:
        start = time.perf_counter()
        try:
            self._execute[action.kind](item)
        except StopRun:
            raise
        except Exception as error:
            where = f"{action} (epoch {item.epoch}, {item.kind} micro-batch {item.index})"
            layers = ", ".join(self.stage.layer_names)
            raise StageError(
                rank=self.rank, stage=self.stage.index, layers=layers, action=where, cause=error
            ) from error
        self.recorder.add(action, start, time.perf_counter(), trains=item.kind == "train")

    def _finish(self, item: Item) -> None:
        if self.inbox is not None and self._held is not None:
            self.inbox.release()
        self._held = None
        self._after_item(item)

    def _receive(self, item: Item) -> None:
        assert self.inbox is not None
        self._held = self.inbox.receive(item)

    def _inputs(self, item: Item) -> tuple[Tensor, Tensor]:
        if self._held is None:
            self._held = self.stage.load(item)
        return self._held

    def _forward(self, item: Item) -> None:
        self._output = self.stage.forward(item, *self._inputs(item))

    def _evaluate(self, item: Item) -> None:
        self._output = self.stage.evaluate(item, *self._inputs(item))

    def _send(self, item: Item) -> None:
        assert self.outbox is not None
        assert self._held is not None
        assert self._output is not None
        self.outbox.send(item, self._output, self._held[1])
        self._output = None
