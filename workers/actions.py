"""The vocabulary of the stream: what passes through the pipeline (`Item`) and what a stage does with it (`Action`).

Both are plain data without a tensor in them, so that schedules can be built, checked and simulated without torch.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, get_args

__all__ = ["ITEM_KINDS", "Action", "ActionKind", "Item", "ItemKind"]

ItemKind = Literal["train", "statistics", "evaluate", "snapshot"]
"""What a stage does with an item: learn from it, re-estimate BatchNorm statistics, score it, or save its own state."""

ITEM_KINDS: Final[tuple[ItemKind, ...]] = get_args(ItemKind)


class ActionKind(StrEnum):
    """What a stage can do with one micro-batch."""

    RECV = "RECV"
    """Wait for the micro-batch from the previous stage."""
    F = "F"
    """Forward with the weights before the update on this micro-batch. Inside a stage every layer but the last also
    updates here, as soon as its output is there: a stage holds the saved activations of one layer at a time."""
    U = "U"
    """Local update."""
    SEND = "SEND"
    """Hand the output to the next stage."""
    E = "E"
    """Evaluate: forward in evaluation mode; the last stage also scores."""
    SNAP = "SNAP"
    """Save the stage's state. Nothing crosses an edge."""
    B = "B"
    """Backpropagation's gradient at the stage's input. This and the three below belong to schedules that local learning
    is compared with: they are simulated, and no worker executes them."""
    W = "W"
    """Backpropagation's gradients of the stage's weights."""
    SENDB = "SENDB"
    """Hand the gradient to the previous stage."""
    RECVB = "RECVB"
    """Wait for the gradient from the next stage."""


@dataclass(frozen=True, slots=True, repr=False)
class Action:
    """One action of one stage. Prints as `2F0`: stage 2, forward, micro-batch 0.

    Attributes:
        stage: the stage that acts, from 0.
        kind: what it does.
        microbatch: the `Item.position` it does it with, counted over the whole run.
    """

    stage: int
    kind: ActionKind
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action that prints as `text`; surrounding blanks are ignored.

        Raises:
            ValueError: `text` is not a stage number, a kind and a micro-batch number.
        """
        match = _ACTION.fullmatch(text.strip())
        if match is None:
            kinds = ", ".join(kind.value for kind in ActionKind)
            raise ValueError(
                f"{text!r} is not an action. Write the stage number, the kind ({kinds}) and the micro-batch number "
                "without blanks, such as 2F0 or 3SEND17."
            )
        return cls(int(match[1]), _KINDS[match[2]], int(match[3]))


@dataclass(frozen=True, slots=True)
class Item:
    """One element of the stream: a micro-batch, or the mark at which every stage saves its state.

    Attributes:
        position: place in the stream, counted over the whole run from 0; a snapshot mark has that of the micro-batch
            that it stands behind.
        kind: what the stages do with it.
        epoch: the epoch it belongs to, from 0.
        index: its number among the items of its kind in this epoch, from 0; a snapshot mark has its micro-batch's.
        size: rows in the micro-batch; 0 for a snapshot.
        last: whether it is the last of its kind in this epoch.
    """

    position: int
    kind: ItemKind
    epoch: int
    index: int
    size: int
    last: bool


_KINDS: Final = {kind.value: kind for kind in ActionKind}
# [0-9] and not \d: \d also matches digits of other scripts, which would not print back as they were read.
_ACTION: Final = re.compile(rf"([0-9]+)({'|'.join(_KINDS)})([0-9]+)")
