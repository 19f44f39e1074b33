"""Marks of the clock: set ahead of every stage, apart by the period, one at a time, and behind training alone."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlocked.runtime.control.windows import WindowPolicy
from unlocked.runtime.schedules.marks import Period, TimedMarks
from unlocked.runtime.schedules.stream import StreamPlan

PLAN = StreamPlan(epochs=3, train_size=10, batch_size=4, eval_size=5, eval_batch_size=3, statistics_batches=1)


@pytest.mark.parametrize(
    ("value", "steps", "seconds"),
    [(0, 0, 0), (200, 200, 0), ("200", 200, 0), ("60s", 0, 60), ("0.5s", 0, 0.5), ("10m", 0, 600), ("2 h", 0, 7200)],
)
def test_a_period_is_steps_or_a_time(value: int | str, steps: int, seconds: float) -> None:
    assert Period.of(value) == Period(steps, seconds)


@pytest.mark.parametrize("value", ["", "s", "60x", "-1s", "0s", "0.01s", "1e3s", "nan", "9999999h", "1" * 400, "٣s"])
def test_what_is_no_period_is_said_in_one_line(value: str) -> None:
    with pytest.raises(ValueError, match=re.escape("number of training micro-batches, or a time from 0.1s")) as caught:
        Period.of(value)
    assert len(str(caught.value)) < 250


def test_marks_by_hand() -> None:
    marks = TimedMarks(PLAN, 10.0, now=100.0)
    assert marks.look(0, 109.9) == set()
    assert marks.look(3, 110.0) == {6}  # 3 to 5 are statistics and evaluation
    assert marks.look(8, 200.0) == {6}, "its snapshot is not complete"
    marks.complete(6)  # another one's
    assert marks.look(8, 200.0) == {6}
    marks.complete(7)
    assert marks.look(8, 200.0) == {8}
    marks.complete(9)
    assert marks.look(12, 209.9) == {8}
    assert marks.look(15, 210.0) == {8}, "there is no training from here on"
    assert TimedMarks(PLAN, 0.0, now=0.0).look(0, 1e9) == set()


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 4), st.booleans()), max_size=40),
    st.integers(1, 5),
)
def test_a_mark_lies_in_what_nobody_was_told_to_do(looks: list[tuple[float, int, bool]], minimum: int) -> None:
    """Whatever the clock and the stages do: a grant never brings a mark that another grant has gone past."""
    now = 0.0
    marks = TimedMarks(PLAN, 1.0, now)
    policy = WindowPolicy(0, len(PLAN), minimum, marks=marks)
    seen: list[tuple[int, float]] = []
    leader = 0
    for passed, steps, completes in looks:
        now, leader = now + passed, min(leader + steps, policy.granted)
        before, old = policy.granted, marks.positions
        policy.observe(leader, now)
        policy.extend()
        for mark in marks.positions - old:
            assert mark == policy.mark >= before
            assert PLAN[mark].kind == "train"
            assert not seen or (mark > seen[-1][0] and now - seen[-1][1] >= 1.0)
            seen.append((mark, now))
        if completes and seen and leader > seen[-1][0]:
            marks.complete(seen[-1][0] + 1)
