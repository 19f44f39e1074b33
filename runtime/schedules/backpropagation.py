"""Backpropagation's pipeline schedules as data: GPipe, 1F1B and zero-bubble, for the simulator.

What local learning is compared with. Nothing here is executed; `unlocked.runtime.schedules.simulate` plays these
lists with the same events, edges and costs as the local schedule. One stage per rank; a step is the micro-batches whose
gradients are added up before the weights move, and the next step begins on a stage once that stage has updated.

- GPipe (Huang et al., 2019): all forwards, then all backwards. A stage keeps every micro-batch of the step.
- 1F1B (PipeDream-flush, Narayanan et al., 2021): the same bubble, but stage s keeps at most S - s micro-batches.
- ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024): the backward pass is cut into B, the gradient at the
  stage's input, which the stage before waits for, and W, the weights' gradients, which nobody waits for and which fill
  the drain. As much memory as 1F1B.
"""

from collections.abc import Callable, Iterator
from typing import Final

from unlocked.runtime.schedules.schedule import Schedule
from unlocked.runtime.schedules.timeline import Timeline
from unlocked.workers.actions import Action, ActionKind

__all__ = ["SCHEDULES", "backpropagation_schedule", "steps_per_second"]

_RECV, _F, _U, _SEND = ActionKind.RECV, ActionKind.F, ActionKind.U, ActionKind.SEND
_RECVB, _B, _W, _SENDB = ActionKind.RECVB, ActionKind.B, ActionKind.W, ActionKind.SENDB


def backpropagation_schedule(name: str, num_stages: int, microbatches: int, steps: int = 1) -> Schedule:
    """The schedule `name` of `SCHEDULES`.

    Args:
        name: "GPipe", "1F1B" or "ZB-H1".
        num_stages: S, one per rank.
        microbatches: M of one step; 1F1B and ZB-H1 are at their best with at least S.
        steps: optimizer steps, one after the other. The U of a step carries its last micro-batch's number.

    Raises:
        ValueError: the name is not known, or a number is below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is not known; valid: {', '.join(SCHEDULES)}")
    for word, value in (("num_stages", num_stages), ("microbatches", microbatches), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{word}={value} is not valid. Give at least 1.")
    order = SCHEDULES[name]
    return Schedule({s: _Stage(s, num_stages).program(order, microbatches, steps) for s in range(num_stages)})


def steps_per_second(timeline: Timeline) -> float:
    """The rate of optimizer steps in a run of several: from the end of stage 0's first update to that of its last."""
    ends = [
        end for action, end in zip(timeline.schedule[0], timeline.ends[0], strict=True) if action.kind is ActionKind.U
    ]
    if len(ends) < 2:
        return 1 / timeline.makespan
    return (len(ends) - 1) / (ends[-1] - ends[0])


class _Stage:
    """What one stage has to do for a forward, a backward and an update, beside its neighbours."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self.stage, self.after = stage, num_stages - 1 - stage

    def program(self, order: "_Order", microbatches: int, steps: int) -> list[Action]:
        actions: list[Action] = []
        for step in range(steps):
            first = step * microbatches
            for kind, microbatch in order(self.stage, self.after, microbatches):
                actions += self._with_transfers(kind, first + microbatch)
            actions.append(Action(self.stage, _U, first + microbatches - 1))
        return actions

    def _with_transfers(self, kinds: tuple[ActionKind, ...], microbatch: int) -> list[Action]:
        """Receives before F and B, and a send after the last of `kinds`."""
        listed: list[ActionKind] = []
        if kinds[0] is _F:
            listed = [*([_RECV] if self.stage else []), _F, *([_SEND] if self.after else [])]
        elif kinds[0] is _B:
            listed = [*([_RECVB] if self.after else []), *kinds, *([_SENDB] if self.stage else [])]
        else:
            listed = list(kinds)
        return [Action(self.stage, kind, microbatch) for kind in listed]


_Work = tuple[tuple[ActionKind, ...], int]
_Order = Callable[[int, int, int], Iterator[_Work]]
_FORWARD, _BACKWARD = (_F,), (_B, _W)  # the whole backward pass before its gradient is sent, as autograd does


def _gpipe(stage: int, after: int, microbatches: int) -> Iterator[_Work]:
    yield from ((_FORWARD, m) for m in range(microbatches))
    yield from ((_BACKWARD, m) for m in range(microbatches))


def _one_forward_one_backward(stage: int, after: int, microbatches: int) -> Iterator[_Work]:
    ahead = min(after, microbatches)  # forwards before the first backward's turn
    yield from ((_FORWARD, m) for m in range(ahead))
    for m in range(microbatches):
        if ahead + m < microbatches:
            yield _FORWARD, ahead + m
        yield _BACKWARD, m


def _zero_bubble(stage: int, after: int, microbatches: int) -> Iterator[_Work]:
    """1F1B's order of F and B; stage s runs W `s` micro-batches late, so that it has that many left for the drain."""
    late = min(stage, microbatches)
    for kinds, m in _one_forward_one_backward(stage, after, microbatches):
        if kinds is _FORWARD:
            yield kinds, m
            continue
        yield (_B,), m
        if m >= late:
            yield (_W,), m - late
    yield from (((_W,), m) for m in range(microbatches - late, microbatches))


SCHEDULES: Final[dict[str, _Order]] = {"GPipe": _gpipe, "1F1B": _one_forward_one_backward, "ZB-H1": _zero_bubble}
"""Name -> the order of a stage's work in one step, from (stage, stages after it, micro-batches)."""
