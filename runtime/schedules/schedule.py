"""The schedule as data: which actions each stage executes, in which order; its text form, and its validator.

Nothing here knows tensors, so a schedule can be made, read, changed and checked on a machine without torch. Several
schedules may be right; `validate` holds what all of them must keep so that the numbers are those of the plain loop.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NoReturn

from unlocked.workers.actions import Action, ActionKind, Item, ItemKind

__all__ = ["Schedule", "build_schedule", "format_grid", "needed_kinds", "stage_actions", "validate"]

_RECV, _F, _U, _SEND, _E, _SNAP, *_ = ActionKind
# SEND stands before U: the output leaves before the local update, so that the next stage can begin at once.
_NEEDED: Final[Mapping[ItemKind, tuple[ActionKind, ...]]] = {
    "train": (_RECV, _F, _SEND, _U),
    "statistics": (_RECV, _F, _SEND),
    "evaluate": (_RECV, _E, _SEND),
    "snapshot": (_SNAP,),
}
# What has to come before an action on the same micro-batch, as far as the item needs it at all.
_BEFORE: Final[Mapping[ActionKind, tuple[ActionKind, ...]]] = {
    _RECV: (),
    _F: (_RECV,),
    _E: (_RECV,),
    _SEND: (_F, _E),
    _U: (_F,),
    _SNAP: (),
}
_EMPTY_STAGE: Final = "-"
_GRID_STEPS: Final = 3  # steps shown before and after the fault
_GRID_STAGES: Final = 3  # stages shown above and below it
_NO_ACTION: Final = "(end)"
ERROR_MARK: Final = "<-- ERROR HERE"


@dataclass(frozen=True)
class Schedule:
    """The actions of every stage, in the order in which the stage executes them.

    Attributes:
        stages: stage number -> its actions.
    """

    stages: dict[int, list[Action]]

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    def __getitem__(self, stage: int) -> list[Action]:
        return self.stages[stage]

    def to_text(self) -> str:
        """One line per stage in stage order, actions separated by commas; a stage without actions is a dash."""
        lines = (self.stages[stage] for stage in sorted(self.stages))
        return "".join((",".join(map(str, actions)) or _EMPTY_STAGE) + "\n" for actions in lines)

    @classmethod
    def from_text(cls, text: str) -> "Schedule":
        """The schedule that `to_text` wrote; blank lines and lines that begin with # are skipped.

        Raises:
            ValueError: a word that is not an action, or an action in the line of another stage.
        """
        stages: dict[int, list[Action]] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            content = line.strip()
            if not content or content.startswith("#"):
                continue
            stage = len(stages)
            try:
                stages[stage] = [] if content == _EMPTY_STAGE else [Action.parse(word) for word in content.split(",")]
            except ValueError as error:
                raise ValueError(f"line {number} of the schedule: {error}") from None
            for action in stages[stage]:
                if action.stage != stage:
                    raise ValueError(
                        f"line {number} of the schedule holds stage {stage}, but also {action}. Write one line per "
                        f"stage, from stage 0 on, and {_EMPTY_STAGE} for a stage without actions."
                    )
        return cls(stages)


def needed_kinds(kind: ItemKind, stage: int, num_stages: int) -> tuple[ActionKind, ...]:
    """The actions that `stage` executes for an item of this kind, in their usual order."""
    ends = {_RECV} if stage == 0 else set()
    if stage == num_stages - 1:
        ends.add(_SEND)
    return tuple(action for action in _NEEDED[kind] if action not in ends)


def stage_actions(stage: int, num_stages: int, items: Iterable[Item]) -> Iterator[Action]:
    """The local schedule of one stage: for each item in turn, everything it needs there.

    Lazy, so that a stage can work through a run of any length in windows.

    Raises:
        ValueError: `stage` is not one of `num_stages` stages.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} does not exist among {num_stages} stages. Stages count from 0.")
    needed = {kind: needed_kinds(kind, stage, num_stages) for kind in _NEEDED}
    return (Action(stage, kind, item.position) for item in items for kind in needed[item.kind])


def build_schedule(num_stages: int, items: Iterable[Item]) -> Schedule:
    """The local schedule of all stages.

    Raises:
        ValueError: fewer than one stage.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages} is not valid. Give at least 1 stage.")
    items = list(items)
    return Schedule({stage: list(stage_actions(stage, num_stages, items)) for stage in range(num_stages)})


def validate(schedule: Schedule, items: Iterable[Item]) -> None:
    """Check that executing `schedule` on `items` trains exactly as the plain loop does.

    For every stage: each item's actions are there exactly once and no others; RECV comes before F or E, which comes
    before SEND, and F before U; nothing of an item stands after the beginning of the next, so that micro-batches keep
    their order, each F sees all earlier updates, and a stage holds one micro-batch. The actions needed include, for
    each RECV, the SEND of the stage before, and orders agree: what is sent is what is received.

    Raises:
        ValueError: says what is wrong, with the grid of stages and steps around it and `<-- ERROR HERE`.
    """
    items = list(items)
    for earlier, later in pairwise(items):
        if (later.position, later.kind == "snapshot") <= (earlier.position, earlier.kind == "snapshot"):
            raise ValueError(f"items are not in stream order: position {later.position} after {earlier.position}.")
    if not schedule.stages:
        raise ValueError("the schedule has no stages. Give it at least stage 0.")
    if set(schedule.stages) != set(range(schedule.num_stages)):
        raise ValueError(f"the schedule has stages {sorted(schedule.stages)}. Number its stages from 0 without gaps.")
    for stage in range(schedule.num_stages):
        _StageCheck(schedule, stage, items).run()


def format_grid(
    schedule: Schedule, stage: int, step: int, *, at: Mapping[int, int] | None = None, mark: str = ERROR_MARK
) -> str:
    """The neighbourhood of one action: stages down, steps across, the action in brackets and `mark` behind its line.

    Args:
        schedule: the schedule.
        stage, step: the action. A step one past the stage's last is shown as the stage's end.
        at: the step to show in the middle for each stage, and in brackets; by default `step` for all of them.
        mark: what stands behind the line of `stage`.
    """
    centres = {stage: step} if at is None else {**at, stage: step}
    shown = [s for s in sorted(schedule.stages) if abs(s - stage) <= _GRID_STAGES]
    offsets = range(-_GRID_STEPS, _GRID_STEPS + 1)
    rows = []
    for row in shown:
        centre = centres.get(row, step)
        cells = [_cell(schedule[row], centre + offset) for offset in offsets]
        middle = cells[_GRID_STEPS]
        cells[_GRID_STEPS] = f"[{middle}]" if row in centres else f" {middle} "
        rows.append((f"stage {row}, step {centre}", cells))
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(offsets))]
    label_width = max(len(label) for label, _ in rows)
    lines = []
    for row, (label, cells) in zip(shown, rows, strict=True):
        body = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append(f"{label.ljust(label_width)} |  {body}  {mark if row == stage else ''}".rstrip())
    return "\n".join(lines)


def _cell(actions: Sequence[Action], step: int) -> str:
    if 0 <= step < len(actions):
        return str(actions[step])
    return _NO_ACTION if step == len(actions) else ""


class _StageCheck:
    """Walks once through one stage's actions, beside the items in order."""

    def __init__(self, schedule: Schedule, stage: int, items: Sequence[Item]) -> None:
        self._schedule, self._stage, self._items = schedule, stage, items
        # A snapshot mark has the position of the micro-batch that it stands behind.
        self._order = {(item.position, item.kind == "snapshot"): number for number, item in enumerate(items)}
        self._needed = {kind: needed_kinds(kind, stage, schedule.num_stages) for kind in _NEEDED}

    def run(self) -> None:
        number = 0  # the item whose actions stand here
        done: list[ActionKind] = []
        for step, action in enumerate(self._schedule[self._stage]):
            found = self._find(step, action)
            if found < number:  # and that item was complete when the walk left it
                self._fault(step, f"{action} comes twice")
            while found > number:
                self._check_complete(step, self._items[number], done)
                number, done = number + 1, []
            self._check_order(step, action, done)
            done.append(action.kind)
        end = len(self._schedule[self._stage])
        for item in self._items[number:]:
            self._check_complete(end, item, done)
            done = []

    def _find(self, step: int, action: Action) -> int:
        """The number of the action's item, once the action is one that this stage executes for it."""
        if action.stage != self._stage:
            self._fault(step, f"{action} stands among the actions of stage {self._stage}")
        found = self._order.get((action.microbatch, action.kind is _SNAP))
        if found is None:
            if action.kind is _SNAP:
                self._fault(step, f"{action} has no snapshot mark behind micro-batch {action.microbatch}")
            known = f"{self._items[0].position} to {self._items[-1].position}" if self._items else "none"
            self._fault(step, f"{action} names micro-batch {action.microbatch}, which is not in the stream ({known})")
        item = self._items[found]
        if action.kind not in self._needed[item.kind]:
            kinds = ", ".join(self._needed[item.kind])
            place = f"stage {self._stage} of {self._schedule.num_stages}"
            self._fault(step, f"{action} does not belong here: {place} needs {kinds} for {_name(item)}")
        return found

    def _check_order(self, step: int, action: Action, done: Sequence[ActionKind]) -> None:
        if action.kind in done:
            self._fault(step, f"{action} comes twice")
        needed = self._needed[self._items[self._order[action.microbatch, action.kind is _SNAP]].kind]
        for kind in _BEFORE[action.kind]:
            if kind in needed and kind not in done:
                self._fault(step, f"{action} comes before {Action(self._stage, kind, action.microbatch)}")

    def _check_complete(self, step: int, item: Item, done: Sequence[ActionKind]) -> None:
        for kind in self._needed[item.kind]:
            if kind not in done:
                missing, why = Action(self._stage, kind, item.position), ""
                if kind is _SEND:
                    why = f"; without it {Action(self._stage + 1, _RECV, item.position)} would wait for ever"
                elif kind is _RECV:
                    why = f"; without it nothing takes {Action(self._stage - 1, _SEND, item.position)}"
                self._fault(step, f"{missing} should come before this{why}")

    def _fault(self, step: int, what: str) -> NoReturn:
        grid = format_grid(self._schedule, self._stage, step)
        raise ValueError(f"the schedule is not valid at stage {self._stage}, step {step}: {what}.\n{grid}")


def _name(item: Item) -> str:
    return (
        f"the snapshot mark behind micro-batch {item.position}"
        if item.kind == "snapshot"
        else f"{item.kind} micro-batch {item.position}"
    )
