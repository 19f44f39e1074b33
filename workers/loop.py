"""The loop that executes a stage's actions. It has no plan of its own: what happens when is the schedule's.

Every engine runs it, over whatever edges it has; a `Lane` is this loop on a stream, with actions that can be captured.
"""

import time
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Final

from unlocked.workers.actions import Action, ActionKind, Item, ItemKind
from unlocked.workers.edges import InEdge, OutEdge, Slot
from unlocked.workers.errors import CalledExitError, MissingActionError, StageError, StopRun
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["StageLoop"]

# What makes an item's output, or saves the stage: missed where an item has no action at all.
_WORK: Final[dict[ItemKind, ActionKind]] = {
    "train": ActionKind.F,
    "statistics": ActionKind.F,
    "evaluate": ActionKind.E,
    "snapshot": ActionKind.SNAP,
}


class StageLoop:
    """Executes actions on one stage.

    The output of F and E is written straight into the slot that SEND lets go.

    Args:
        stage: the layers.
        rank: for messages.
        inbox, outbox: the edges; None at the ends of the pipeline (stage 0 reads the dataset instead).
        snapshot: called for SNAP.
        before_item, after_item: called around everything that a stage does for an item of the stream.
        stopwatch: adds up busy and waiting times.
        before_action: called before every action, for those who want it to fail.
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
        stopwatch: Stopwatch,
        before_action: Callable[[Action], None] | None = None,
    ) -> None:
        self.stage, self.rank, self.inbox, self.outbox = stage, rank, inbox, outbox
        self.stopwatch = stopwatch
        self._snapshot, self._before_item, self._after_item = snapshot, before_item, after_item
        self._before_action = before_action
        self._held: Slot | None = None
        self._is_done = self._send_due = self._update_due = False  # of the item at hand
        self._execute: dict[ActionKind, Callable[[Item], None]] = {
            ActionKind.RECV: self._receive,
            ActionKind.F: self._forward,
            ActionKind.E: self._forward,
            ActionKind.U: self._update,
            ActionKind.SEND: self._send,
            ActionKind.SNAP: self._save,
        }

    def run(self, items: Iterable[Item], actions: Iterable[Action]) -> None:
        """Executes the actions of `items`, in order.

        Raises:
            StageError: names rank, stage, layers and action, with the cause chained. An item that is not worked off to
                its end (received, computed, sent, learned from) is a `MissingActionError`.
        """
        items = list(items)
        if self.inbox is not None:
            self.inbox.expect(item for item in items if item.kind != "snapshot")
        of_item = groupby(actions, _place)
        for item in items:
            place, its_actions = next(of_item, (None, ()))
            if place != (item.position, item.kind == "snapshot"):
                self._miss(_WORK[item.kind], item)
            self._before_item(item)
            self.work(item, its_actions)
            self._after_item(item)

    def work(self, item: Item, actions: Iterable[Action]) -> None:
        """The actions of one item and nothing around them. Raises as `run` does."""
        self._is_done = self._send_due = self._update_due = False
        for action in actions:
            self._run_action(action, item)
        if not self._is_done:
            self._miss(_WORK[item.kind], item)
        if self._send_due:
            self._miss(ActionKind.SEND, item)
        if self._update_due:
            self._miss(ActionKind.U, item)
        self._let_go()

    def _let_go(self) -> None:
        """Gives the received slot back."""
        if self.inbox is not None and self._held is not None:
            self.inbox.release()
        self._held = None

    def _run_action(self, action: Action, item: Item) -> None:
        start = time.perf_counter()
        self._guarded(action, item)
        self.stopwatch.add(action, start, time.perf_counter(), trains=item.kind == "train")

    def _guarded(self, action: Action, item: Item) -> None:
        """The one place where a failure learns where it happened."""
        try:
            if self._before_action is not None:
                self._before_action(action)
            self._execute[action.kind](item)
        except (StopRun, StageError):
            raise
        except Exception as error:
            raise self._located(action, item, error) from error
        except SystemExit as error:
            raise self._located(action, item, CalledExitError(error.code)) from error

    def _located(self, action: Action, item: Item, cause: Exception) -> StageError:
        where = f"{action} (epoch {item.epoch}, {item.kind} micro-batch {item.index})"
        layers = ", ".join(self.stage.layer_names)
        return StageError(rank=self.rank, stage=self.stage.index, layers=layers, action=where, cause=cause)

    def _miss(self, kind: ActionKind, item: Item) -> None:
        action = Action(self.stage.index, kind, item.position)
        cause = MissingActionError(str(action))
        raise self._located(action, item, cause) from cause

    def _receive(self, item: Item) -> None:
        assert self.inbox is not None
        self._held = self.inbox.receive(item)

    def _forward(self, item: Item) -> None:
        """F and E."""
        if self._held is None and self.inbox is not None:
            self._miss(ActionKind.RECV, item)
        slot = None if self.outbox is None else self.outbox.reserve(item)
        if self._held is None:
            self._held = self._load(item, slot)
        self._compute(item, self._held, slot)
        self._is_done, self._send_due, self._update_due = True, slot is not None, item.kind == "train"

    def _load(self, item: Item, slot: Slot | None) -> Slot:
        """Stage 0's input, out of the dataset."""
        return self.stage.load(item)

    def _compute(self, item: Item, held: Slot, slot: Slot | None) -> None:
        """The output of `held`, into `slot` if there is one."""
        x, labels = held
        act = self.stage.evaluate if item.kind == "evaluate" else self.stage.forward
        if slot is None:
            act(item, x, labels)
            return
        out, out_labels = slot
        act(item, x, labels, out)
        if labels is not out_labels:
            out_labels.copy_(labels)

    def _send(self, item: Item) -> None:
        assert self.outbox is not None
        if not self._is_done:
            self._miss(_WORK[item.kind], item)
        self.outbox.send(item)
        self._send_due = False

    def _update(self, item: Item) -> None:
        if not self._update_due:
            self._miss(ActionKind.F, item)
        self._learn(item)
        self._update_due = False

    def _learn(self, item: Item) -> None:
        self.stage.update(item)

    def _save(self, item: Item) -> None:
        self._snapshot(item)
        self._is_done = True


def _place(action: Action) -> tuple[int, bool]:
    """Tells the items of the stream apart: a snapshot mark has the position of the micro-batch before it."""
    return action.microbatch, action.kind is ActionKind.SNAP
