"""Backpropagation's pipeline schedules: what a stage has to do, and the closed forms of their bubbles."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.backpropagation import (
    SCHEDULES,
    backpropagation_schedule,
    steps_per_second,
)
from unlocked.runtime.schedules.schedule import Schedule, build_schedule
from unlocked.runtime.schedules.simulate import Costs, simulate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Timeline
from unlocked.workers.actions import ActionKind as K

STEPS = 3


def play(name: str, stages: int, microbatches: int, costs: dict[K, float], transfer: float = 0.0) -> Timeline:
    schedule = backpropagation_schedule(name, stages, microbatches, STEPS)
    return simulate(schedule, Costs([costs] * stages, [transfer] * (stages - 1)), microbatches)


def most_kept(schedule: Schedule, stage: int) -> int:
    """Micro-batches whose activations a stage keeps at once: from F to W, which needs them last."""
    kept = most = 0
    for action in schedule[stage]:
        kept += {K.F: 1, K.W: -1}.get(action.kind, 0)
        most = max(most, kept)
    return most


def test_one_forward_one_backward_by_hand() -> None:
    assert backpropagation_schedule("1F1B", 2, 2).to_text() == (
        "0F0,0SEND0,0F1,0SEND1,0RECVB0,0B0,0W0,0RECVB1,0B1,0W1,0U1\n"
        "1RECV0,1F0,1B0,1W0,1SENDB0,1RECV1,1F1,1B1,1W1,1SENDB1,1U1\n"
    )
    assert backpropagation_schedule("ZB-H1", 2, 2).to_text() == (
        "0F0,0SEND0,0F1,0SEND1,0RECVB0,0B0,0W0,0RECVB1,0B1,0W1,0U1\n"
        "1RECV0,1F0,1B0,1SENDB0,1RECV1,1F1,1B1,1SENDB1,1W0,1W1,1U1\n"
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3))
def test_every_stage_does_everything_once(name: str, stages: int, microbatches: int, steps: int) -> None:
    schedule = backpropagation_schedule(name, stages, microbatches, steps)
    assert Schedule.from_text(schedule.to_text()) == schedule
    timeline = simulate(
        schedule, Costs([{K.F: 1, K.B: 1, K.W: 1, K.U: 1}] * stages, [0.5] * (stages - 1)), microbatches
    )
    end = {(span.stage, span.action.kind, span.action.microbatch): span.end for span in timeline.spans}
    start = {(span.stage, span.action.kind, span.action.microbatch): span.start for span in timeline.spans}
    for stage in range(stages):
        counts = Counter((action.kind, action.microbatch) for action in schedule[stage])
        assert set(counts.values()) == {1}
        assert sum(kind is K.U for kind, _ in counts) == steps
        for m in range(microbatches * steps):
            assert end[stage, K.F, m] <= start[stage, K.B, m] < end[stage, K.B, m] <= start[stage, K.W, m]
            if stage:
                assert end[stage - 1, K.F, m] + 0.5 <= start[stage, K.F, m]
                assert end[stage, K.B, m] + 0.5 <= start[stage - 1, K.B, m]


def bubble_seconds(name: str, num_stages: int, *, forward: float, backward: float, weights: float) -> float:
    """The closed form of a stage's time without work in one step of equal stages with free transfers.

    (S - 1)(F + B + W) for GPipe and 1F1B; (S - 1)(F + B - W) for ZB-H1 with at least S micro-batches and W no longer
    than F or B (Qi et al., table 2).
    """
    drained = -weights if name == "ZB-H1" else weights
    return (num_stages - 1) * (forward + backward + drained)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize(("forward", "backward", "weights"), [(1, 1, 1), (1, 2, 1), (2, 3, 1)])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_bubbles_are_those_of_the_closed_forms(
    name: str, stages: int, forward: int, backward: int, weights: int
) -> None:
    microbatches = 2 * stages
    timeline = play(name, stages, microbatches, {K.F: forward, K.B: backward, K.W: weights, K.U: 0})
    work = microbatches * (forward + backward + weights)
    expected = bubble_seconds(name, stages, forward=forward, backward=backward, weights=weights)
    assert 1 / steps_per_second(timeline) == pytest.approx(work + expected)
    if name != "ZB-H1":  # the textbook's share: (S - 1) / (M + S - 1)
        assert expected / (work + expected) == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize("stages", [2, 5, 8])
def test_zero_bubble_has_less_and_local_learning_none(stages: int) -> None:
    costs = {K.F: 1.0, K.B: 1.0, K.W: 1.0, K.U: 0.0}
    rates = {name: 32 * steps_per_second(play(name, stages, 32, costs)) for name in SCHEDULES}
    local = simulate(
        build_schedule(stages, StreamPlan(epochs=1, train_size=64, batch_size=1)),
        Costs.uniform(stages, forward=1, update=2),
        2,
    )
    assert rates["GPipe"] == pytest.approx(rates["1F1B"])
    assert rates["1F1B"] < rates["ZB-H1"] < local.throughput
    assert local.throughput == pytest.approx(1 / 3)
    assert all(bubble.steady == 0 for bubble in local.bubbles)


def test_what_a_stage_keeps() -> None:
    stages, microbatches = 5, 12
    kept = {
        name: [most_kept(backpropagation_schedule(name, stages, microbatches), stage) for stage in range(stages)]
        for name in SCHEDULES
    }
    assert kept["GPipe"] == [microbatches] * stages
    assert kept["1F1B"] == [stages - stage for stage in range(stages)]
    assert max(kept["ZB-H1"]) == stages  # as much as 1F1B at its most


def test_transfers_cost_backpropagation_twice() -> None:
    costs = {K.F: 1.0, K.B: 1.0, K.W: 1.0, K.U: 0.0}
    free, slow = (1 / steps_per_second(play("GPipe", 4, 8, costs, transfer)) for transfer in (0.0, 0.25))
    assert slow - free == pytest.approx(2 * 3 * 0.25)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="'zb' is not known; valid: GPipe, 1F1B, ZB-H1"):
        backpropagation_schedule("zb", 2, 2)
    with pytest.raises(ValueError, match="microbatches=0"):
        backpropagation_schedule("1F1B", 2, 0)
