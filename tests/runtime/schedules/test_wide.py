"""Wide pipelines: the times of the simulator that plays every action, the closed forms of bubbles, and what is known of
rates that a link bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.backpropagation import backpropagation_schedule
from unlocked.runtime.schedules.schedule import build_schedule
from unlocked.runtime.schedules.simulate import Costs, simulate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Timeline
from unlocked.runtime.schedules.wide import (
    ASYNCHRONOUS,
    LOCAL,
    Seconds,
    _play,
    _program,
    local_ends,
    simulate_wide,
)
from unlocked.workers.actions import ActionKind as K

costs = st.sampled_from([0.0, 0.25, 1.0, 1.5, 3.0])  # whose sums are exact
stages, counts = st.integers(1, 6), st.integers(1, 9)


def of(timeline: Timeline, kind: K, begins: bool) -> np.ndarray:
    """[stages, micro-batches]"""
    times = timeline.starts if begins else timeline.ends
    rows = [
        {
            action.microbatch: at
            for action, at in zip(timeline.schedule[stage], times[stage], strict=True)
            if action.kind is kind
        }
        for stage in range(timeline.schedule.num_stages)
    ]
    return np.array([[row[m] for m in sorted(row)] for row in rows])


@settings(max_examples=100, deadline=None)
@given(stages, counts, st.integers(1, 3), costs, costs, costs)
def test_local_learning_has_the_times_of_the_other_simulator(
    s: int, m: int, depth: int, forward: float, update: float, transfer: float
) -> None:
    plan = StreamPlan(epochs=1, train_size=m, batch_size=1)
    uniform = Costs.uniform(s, forward=forward, update=update, transfer=transfer)
    timeline = simulate(build_schedule(s, plan), uniform, depth)
    own = Seconds(forward=forward, update=update, backward=0, weights=0, transfer=transfer)
    begins, ends = local_ends(s, own, m, depth)
    assert (begins == of(timeline, K.F, True)).all()
    assert (ends == of(timeline, K.U, False)).all()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["GPipe", "1F1B", "ZB-H1"]), stages, counts, st.integers(1, 3), costs, costs, costs, costs, costs
)
def test_backpropagation_has_the_times_of_the_other_simulator(
    name: str, s: int, m: int, steps: int, forward: float, backward: float, weights: float, step: float, transfer: float
) -> None:
    schedule = backpropagation_schedule(name, s, m, steps)
    row = {K.F: forward, K.B: backward, K.W: weights, K.U: step}
    timeline = simulate(schedule, Costs([row] * s, [transfer] * (s - 1)), steps * m)
    own = Seconds(forward=forward, update=0, backward=backward, weights=weights, optimizer=step, transfer=transfer)
    ended = _play(_program(name, s, m, steps), own)
    assert (ended[-1] == of(timeline, K.F, True)).all()
    assert (ended[0] == of(timeline, K.F, False)).all()
    assert (ended[4][:, m - 1 :: m] == of(timeline, K.U, False)).all()


@pytest.mark.parametrize("s", [2, 8, 32])
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_bubbles_are_those_of_the_closed_forms(s: int, rounds: int) -> None:
    """Of a step: (S - 1) / (M + S - 1) for GPipe and 1F1B (Narayanan et al., 2021); (S - 1) (F + B - W) seconds for
    ZB-H1 (Qi et al., table 2); none without a flush."""
    m, third = rounds * s, Seconds(forward=1, update=1, backward=1, weights=1)
    for name in ("GPipe", "1F1B"):
        found = simulate_wide(name, s, third, microbatches=m)
        assert 1 - found.busy == pytest.approx((s - 1) / (m + s - 1))
        assert found.fill == s - 1
    assert simulate_wide("ZB-H1", s, third, microbatches=m).period == pytest.approx((3 * m + s - 1) / m)
    assert simulate_wide(ASYNCHRONOUS, s, third, microbatches=m).period == pytest.approx(3)


@pytest.mark.parametrize("s", [2, 64, 512])
@pytest.mark.parametrize(
    ("transfer", "depth", "period"), [(0, 2, 3), (1, 2, 3), (2.5, 2, 3), (7, 2, 7), (1, 1, 4), (7, 1, 10)]
)
def test_local_learning_is_bound_by_its_slowest_part(s: int, transfer: float, depth: int, period: float) -> None:
    """By work or transfer, whichever takes longer; with one slot, which the work holds to its end, by both together."""
    found = simulate_wide(
        LOCAL, s, Seconds(forward=1, update=2, backward=0, weights=0, transfer=transfer), queue_depth=depth
    )
    assert found.period == pytest.approx(period)
    assert found.fill == pytest.approx((s - 1) * (1 + transfer))


@pytest.mark.parametrize("s", [2, 8, 64])
@pytest.mark.parametrize("transfer", [0.0, 0.5, 2.0])
def test_without_a_flush_the_way_there_and_back_bounds_the_rate(s: int, transfer: float) -> None:
    """Stage 0 has S micro-batches under way, each of which takes (F + B + W) S and 2 (S - 1) transfers."""
    found = simulate_wide(
        ASYNCHRONOUS, s, Seconds(forward=1, update=0, backward=1, weights=1, transfer=transfer), microbatches=4 * s
    )
    assert found.period == pytest.approx((3 * s + 2 * transfer * (s - 1)) / s)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: simulate_wide("1f1b", 2, Seconds(forward=1, update=1, backward=1, weights=1)), "valid: local, GPipe"),
        (lambda: simulate_wide(LOCAL, 0, Seconds(forward=1, update=1, backward=1, weights=1)), "num_stages=0"),
        (lambda: Seconds(forward=-1, update=1, backward=1, weights=1), "forward is -1"),
        (lambda: Seconds(forward=1, update=float("inf"), backward=1, weights=1), "update is inf"),
    ],
)
def test_mistakes_are_refused(call: "object", match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()  # type: ignore[operator]
