"""Which fault comes next, and when: at any moment, by the clock, or before a stated action of the run."""

import random
from dataclasses import dataclass

from unlocked.comparison.chaos.kinds import TYPED
from unlocked.comparison.chaos.options import ChaosOptions
from unlocked.runtime.faults import Fault, fail_at
from unlocked.runtime.schedules.schedule import needed_kinds
from unlocked.runtime.schedules.stream import StreamPlan

__all__ = ["Armed", "Armoury"]

_AGAIN = 0.25  # share of the deaths at an action that the next worker dies there as well
_HORIZON = 40  # stream positions ahead in which a stated action is chosen


@dataclass(frozen=True, slots=True)
class Armed:
    """What is to happen: `kind` after `seconds`, or `faults` before their actions, one after the other."""

    kind: str
    seconds: float = 0.0
    faults: tuple[Fault, ...] = ()
    moment: str = ""
    """Of `faults`."""
    in_run: bool = False
    """Whether `seconds` begin once the run makes progress; else with its start, so that set-up is hit as well."""


class Armoury:
    """Draws the faults of a run, reproducibly as far as the run is.

    Args:
        begun: faults of the campaign that have been before.
    """

    def __init__(self, options: ChaosOptions, plan: StreamPlan, stages: int, begun: int = 0) -> None:
        self._options, self._plan, self._stages = options, plan, stages
        self._typed = [name for name in options.kinds if name in TYPED]
        self._given = begun
        self.chance = random.Random(f"{options.chaos_seed} {begun}")
        self.furthest = 0
        """The first stream position that the run has not come to yet, as far as is known."""

    def draw(self, position: int) -> Armed:
        """The fault of a start from `position`."""
        if self._typed and self.chance.random() < self._options.at_actions and position < len(self._plan):
            return self._typed_fault(position)
        return self.draw_timed()

    def draw_timed(self) -> Armed:
        """A fault at any moment: every kind in turn, at times that are exponentially distributed."""
        kinds = self._options.kinds
        kind = kinds[self._given % len(kinds)]
        self._given += 1
        seconds = self.chance.expovariate(1 / self._options.mean_seconds)
        return Armed(kind, seconds=seconds, in_run=self.chance.random() < 0.5)

    def _typed_fault(self, start: int) -> Armed:
        items = list(self._plan.items(start, min(start + _HORIZON, len(self._plan))))
        kind_of_item = self.chance.choice(sorted({item.kind for item in items}))  # so that rare ones come as well
        item = self.chance.choice([one for one in items if one.kind == kind_of_item])
        stage = self.chance.randrange(self._stages)
        action = self.chance.choice(needed_kinds(item.kind, stage, self._stages))
        kind = self.chance.choice(self._typed)
        moment = {"snapshot": "snapshot", "evaluate": "evaluation"}.get(item.kind, "steady state")
        fault = fail_at(stage, action.value, item.position, kind)
        if kind != "stop" and self.chance.random() < _AGAIN:  # the next worker dies at the end of its replay
            again = fail_at(stage, action.value, item.position, kind, incarnation=1)
            return Armed(kind, faults=(fault, again), moment="replay")
        moment = "replay" if item.position < self.furthest else moment
        return Armed(kind, faults=(fault,), moment=moment)
