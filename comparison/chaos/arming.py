"""Which fault comes next, and when: at any moment, by the clock, or before a stated action of the run."""

import random
from dataclasses import dataclass

from unlocked.comparison.chaos.kinds import TYPED
from unlocked.comparison.chaos.options import ChaosOptions
from unlocked.runtime.faults import Fault, fail_at
from unlocked.runtime.schedules.schedule import needed_kinds
from unlocked.runtime.schedules.stream import StreamPlan

__all__ = ["Armed", "Armoury"]

_HORIZON = 40  # stream positions ahead in which a stated action is chosen


@dataclass(frozen=True, slots=True)
class Armed:
    """What is to happen: `kind` after `seconds`, or `fault` before its action."""

    kind: str
    seconds: float = 0.0
    fault: Fault | None = None
    moment: str = ""
    """Of `fault`."""
    in_run: bool = False
    """Whether `seconds` begin once the run makes progress; else with its start, so that set-up is hit as well."""


class Armoury:
    """Draws the faults of a campaign, reproducibly as far as the runs are."""

    def __init__(self, options: ChaosOptions, plan: StreamPlan, stages: int) -> None:
        self._options, self._plan, self._stages = options, plan, stages
        self._typed = [name for name in options.kinds if name in TYPED]
        self._given = 0
        self.chance = random.Random(options.chaos_seed)
        self.furthest = 0
        """The first stream position that no run has come to yet, as far as is known; set it anew for every run."""

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
        moment = "replay" if item.position < self.furthest else moment
        return Armed(kind, fault=fail_at(stage, action.value, item.position, kind), moment=moment)
