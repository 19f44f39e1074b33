"""Pipelines of hundreds of equal stages, simulated with the rules of `simulate` but without an object per action.

`simulate` plays any schedule, and takes a microsecond and 200 bytes per action: a thousand stages with thousands of
micro-batches are out of its reach. Here all stages take their next piece of work together, as numpy vectors: whatever a
stage waits for is decided by the order of its work alone, so the times are those of `simulate`, to the last bit.

- Local learning: RECV F SEND U, over edges of `queue_depth` slots.
- Backpropagation: the orders of `backpropagation.SCHEDULES`, over edges with a slot for every micro-batch of a step;
  and PipeDream-2BW (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021): the order of 1F1B
  without its flush. Weights of one update before let the next micro-batches enter while those of the step come back.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from unlocked.runtime.schedules.backpropagation import SCHEDULES
from unlocked.workers.actions import ActionKind

__all__ = ["ASYNCHRONOUS", "LOCAL", "WIDE", "Seconds", "WideTimes", "simulate_wide"]

LOCAL: Final = "local"
ASYNCHRONOUS: Final = "PipeDream-2BW"
WIDE: Final = (LOCAL, "GPipe", "1F1B", "ZB-H1", ASYNCHRONOUS)
"""What can be simulated."""

_Times = npt.NDArray[np.float64]
_STEPS = 2  # of a schedule with a flush: the second one is like all that follow
_UNKNOWN = math.nan


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What one stage takes for one micro-batch, and one transfer to a neighbour.

    Attributes:
        forward, update: of local learning; backpropagation has the same forward pass.
        backward, weights: the gradient at the stage's input, and those of its weights.
        optimizer: once a step of backpropagation.
        transfer: latency and bytes over bandwidth; an edge carries one micro-batch at a time.
    """

    forward: float
    update: float
    backward: float
    weights: float
    optimizer: float = 0.0
    transfer: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value} seconds; they must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class WideTimes:
    """What came of it.

    Attributes:
        period: seconds per micro-batch in the steady state, of whole steps where there is a flush.
        fill: seconds until the last stage begins its first forward pass.
        drain: seconds from the end of stage 0's forward passes to the end of everything; where there is a flush, both
            are paid in every step.
        busy: share of the steady state in which a stage works.
    """

    period: float
    fill: float
    drain: float
    busy: float

    @property
    def throughput(self) -> float:
        """Micro-batches per second in the steady state."""
        return 1 / self.period


def simulate_wide(
    name: str, num_stages: int, seconds: Seconds, *, microbatches: int = 0, queue_depth: int = 2
) -> WideTimes:
    """Plays one of `WIDE`.

    Args:
        num_stages: S, equal ones.
        microbatches: of a step; default 2 S. Local learning has no steps: its stream has so many. PipeDream-2BW's has
            four times as many.
        queue_depth: of the edges of local learning.

    Raises:
        ValueError: the name is not known, or a number is below 1.
    """
    microbatches = microbatches or 2 * num_stages
    for word, value in (("num_stages", num_stages), ("microbatches", microbatches), ("queue_depth", queue_depth)):
        if value < 1:
            raise ValueError(f"{word}={value} is not valid. Give at least 1.")
    if name == LOCAL:
        return _local(num_stages, seconds, microbatches, queue_depth)
    if name == ASYNCHRONOUS:
        return _unflushed(num_stages, seconds, microbatches)
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is not known; valid: {', '.join(WIDE)}")
    return _flushed(name, num_stages, seconds, microbatches)


def local_ends(num_stages: int, seconds: Seconds, microbatches: int, queue_depth: int) -> tuple[_Times, _Times]:
    """Seconds at which each stage's F begins and its U ends, [stages, micro-batches].

    Along the diagonals stage + 2 micro-batch = constant nothing waits for anything of the same diagonal: F waits for
    the stage's own micro-batch before (two diagonals back) and the neighbour's F (one), a transfer for a slot that the
    receiver has freed at least `queue_depth` micro-batches before (at least one).
    """
    shape = (num_stages, microbatches)
    begins, ends, delivered = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for diagonal in range(num_stages + 2 * microbatches - 2):
        first = max(0, -(-(diagonal - num_stages + 1) // 2))
        m = np.arange(first, min(microbatches - 1, diagonal // 2) + 1)
        s = diagonal - 2 * m
        begin = np.where(m > 0, ends[s, m - 1], 0.0)
        begin = np.maximum(begin, np.where(s > 0, delivered[s - 1, m], 0.0))
        sent = begin + seconds.forward
        sends = s < num_stages - 1
        # SEND waits until the output slot is free, and the transfer until the receiver has a slot.
        sent = np.where(sends & (m > 0), np.maximum(sent, delivered[s, m - 1]), sent)
        after = np.minimum(s + 1, num_stages - 1)
        freed = np.where(m >= queue_depth, ends[after, np.maximum(m - queue_depth, 0)], 0.0)
        begins[s, m], ends[s, m] = begin, sent + seconds.update
        delivered[s, m] = np.where(sends, np.maximum(sent, freed) + seconds.transfer, 0.0)
    return begins, ends


def _local(num_stages: int, seconds: Seconds, microbatches: int, queue_depth: int) -> WideTimes:
    begins, ends = local_ends(num_stages, seconds, microbatches, queue_depth)
    period = _slope(ends[-1])
    return WideTimes(
        period=period,
        fill=float(begins[-1, 0]),
        drain=float(ends.max() - ends[0, -1]),
        busy=(seconds.forward + seconds.update) / period,
    )


def _slope(ends: _Times, cycle: int = 1) -> float:
    """Seconds per micro-batch of the middle half; whatever comes in bursts does so every `cycle` micro-batches."""
    first, count = len(ends) // 4, len(ends) // 2 // cycle * cycle
    return float((ends[first + count] - ends[first]) / count) if count else float(ends[-1] / len(ends))


# Backpropagation's pieces of work
_F, _BW, _B, _W, _U = range(5)
_CODES = {(ActionKind.F,): _F, (ActionKind.B, ActionKind.W): _BW, (ActionKind.B,): _B, (ActionKind.W,): _W}


@dataclass(frozen=True, slots=True)
class _Program:
    """Every stage's work in order: kind and micro-batch, [stages, pieces]."""

    kinds: npt.NDArray[np.int8]
    microbatches: npt.NDArray[np.int32]


@lru_cache(maxsize=4)  # the same on every link; of a thousand stages a second of work
def _program(name: str, num_stages: int, microbatches: int, steps: int) -> _Program:
    kinds, numbers = [], []
    for stage in range(num_stages):
        work = [(_CODES[kind], m) for kind, m in SCHEDULES[name](stage, num_stages - 1 - stage, microbatches)]
        work.append((_U, microbatches - 1))
        kinds.append(np.tile(np.array([kind for kind, _ in work], np.int8), steps))
        own = np.array([m for _, m in work], np.int32)
        numbers.append(np.concatenate([own + step * microbatches for step in range(steps)]))
    return _Program(np.stack(kinds), np.stack(numbers))


def _play(program: _Program, seconds: Seconds) -> dict[int, _Times]:
    """{kind: when it ended, [stages, micro-batches]}, of B also where W came with it; "F begins" under -1."""
    (num_stages, pieces), count = program.kinds.shape, int(program.microbatches.max()) + 1
    cost = np.empty(5)
    cost[[_F, _B, _W, _U]] = seconds.forward, seconds.backward, seconds.weights, seconds.optimizer
    cost[_BW] = seconds.backward + seconds.weights
    # A row more at either end, of a neighbour that waits for nothing: stages are 1 to S.
    onward, back = np.full((num_stages + 2, count), _UNKNOWN), np.full((num_stages + 2, count), _UNKNOWN)
    onward[0] = back[num_stages + 1] = 0.0
    ended = {kind: np.full((num_stages, count), _UNKNOWN) for kind in (-1, _F, _B, _W, _U)}
    clock, place = np.zeros(num_stages), np.zeros(num_stages, np.int64)
    while (todo := np.flatnonzero(place < pieces)).size:
        kind, m = program.kinds[todo, place[todo]], program.microbatches[todo, place[todo]]
        forward, backward = kind == _F, (kind == _B) | (kind == _BW)
        due = np.where(forward, onward[todo, m], np.where(backward, back[todo + 2, m], 0.0))
        ready = ~np.isnan(due)
        s, kind, m, due = todo[ready], kind[ready], m[ready], due[ready]
        forward, backward = forward[ready], backward[ready]
        begin = np.maximum(clock[s], due)
        end = begin + cost[kind]
        # SEND and SENDB wait until the output slot is free.
        sends, returns = forward & (s < num_stages - 1), backward & (s > 0)
        held = np.where(sends, onward[s + 1, m - 1], np.where(returns, back[s + 1, m - 1], 0.0))
        clock[s] = np.where(m > 0, np.maximum(end, held), end)
        ended[-1][s[forward], m[forward]] = begin[forward]
        for one, where in ((_F, forward), (_B, backward), (_W, kind == _W), (_U, kind == _U)):
            ended[one][s[where], m[where]] = end[where]
        onward[s[forward] + 1, m[forward]] = clock[s[forward]] + seconds.transfer
        back[s[backward] + 1, m[backward]] = clock[s[backward]] + seconds.transfer
        place[s] += 1
    return ended


def _flushed(name: str, num_stages: int, seconds: Seconds, microbatches: int) -> WideTimes:
    ended = _play(_program(name, num_stages, microbatches, _STEPS), seconds)
    first, second = (float(ended[_U][0, step * microbatches - 1]) for step in (1, 2))
    period = (second - first) / microbatches
    return WideTimes(
        period=period,
        fill=float(ended[-1][-1, 0]),
        drain=first - float(ended[_F][0, microbatches - 1]),
        busy=_work(seconds, microbatches) / period,
    )


def _unflushed(num_stages: int, seconds: Seconds, microbatches: int) -> WideTimes:
    """An optimizer's step is as long as it is, whenever it comes: it is spread over the step's micro-batches."""
    spread = replace(seconds, weights=seconds.weights + seconds.optimizer / microbatches, optimizer=0.0)
    ended = _play(_program("1F1B", num_stages, 4 * microbatches, 1), spread)
    period = _slope(ended[_B][0], cycle=num_stages)
    return WideTimes(
        period=period,
        fill=float(ended[-1][-1, 0]),
        drain=float(ended[_B][0, -1] - ended[_F][0, -1]),
        busy=_work(seconds, microbatches) / period,
    )


def _work(seconds: Seconds, microbatches: int) -> float:
    """Of a stage, per micro-batch of backpropagation."""
    return seconds.forward + seconds.backward + seconds.weights + seconds.optimizer / microbatches
