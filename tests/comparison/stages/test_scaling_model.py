"""The cost model of a pipeline: fits that find what was put in, predictions that meet closed forms."""

import pytest

from unlocked.comparison.stages.scaling_model import LOCAL, CostModel, Line, Link, predict, stage_factors
from unlocked.runtime.schedules.backpropagation import SCHEDULES

BLOCKS = 2
FREE = Link(seconds=0.0, occupies_sender=False)
# Blocks of 2 s forward and 3 s update under the local rule; of 2, 1.5 and 1.5 s under backpropagation.
MODEL = CostModel(
    step=Line(intercept=0.0, slope=5.0, largest_residual=0.0),
    forward_share=0.4,
    output=0.0,
    hop=Line(intercept=0.0, slope=0.0, largest_residual=0.0),
    backpropagation={"F": 2.0, "B": 1.5, "W": 1.5, "U": 0.0},
)


def test_a_line_is_found_again() -> None:
    line = Line.fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0])
    assert (line.intercept, line.slope) == pytest.approx((3, 2))
    assert line.largest_residual == pytest.approx(0, abs=1e-12)
    assert line.at(10) == pytest.approx(23)
    bent = Line.fit([1.0, 2.0, 4.0], [5.0, 7.0, 12.0])
    assert 0 < bent.largest_residual < 0.1
    with pytest.raises(ValueError, match="two different points"):
        Line.fit([1.0, 1.0], [2.0, 3.0])


@pytest.mark.parametrize("stages", [1, 3, 16])
def test_equal_stages_lose_nothing_by_local_learning(stages: int) -> None:
    found = predict(MODEL, LOCAL, stages, blocks=BLOCKS, link=FREE)
    assert found.microbatches_per_second == pytest.approx(1 / 10)
    assert found.efficiency == pytest.approx(1)
    assert found.fill_seconds == pytest.approx((stages - 1) * (2 + 5))  # only the last update waits for SEND


@pytest.mark.parametrize("stages", [1, 3, 16])
def test_backpropagation_drains_at_every_step(stages: int) -> None:
    for name in SCHEDULES:
        found = predict(MODEL, name, stages, blocks=BLOCKS, link=FREE, microbatches=16)
        bubble = (stages - 1) * (4 + 3 - 3 if name == "ZB-H1" else 4 + 3 + 3)
        assert found.microbatches_per_second == pytest.approx(16 / (16 * 10 + bubble))
        assert found.efficiency == pytest.approx(160 / (160 + bubble))
        assert found.fill_seconds == pytest.approx((stages - 1) * 4)


def test_a_hop_costs_the_sender_or_only_time() -> None:
    copied = predict(MODEL, LOCAL, 4, blocks=BLOCKS, link=Link(seconds=1.0, occupies_sender=True))
    carried = predict(MODEL, LOCAL, 4, blocks=BLOCKS, link=Link(seconds=1.0, occupies_sender=False))
    assert copied.microbatches_per_second == pytest.approx(1 / 11)
    assert carried.microbatches_per_second == pytest.approx(1 / 10)
    assert carried.fill_seconds == pytest.approx(3 * (7 + 1))


def test_a_slow_stage_sets_the_pace_of_local_learning() -> None:
    factors = stage_factors(8, 0.3, seed=1)
    found = predict(MODEL, LOCAL, 8, blocks=BLOCKS, link=FREE, spread=0.3, seed=1)
    assert found.microbatches_per_second == pytest.approx(1 / (10 * max(factors)))
    assert stage_factors(4, 0.3, seed=1) == factors[:4]
    assert stage_factors(3, 0.0) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="spread=-1"):
        stage_factors(2, -1)


def test_faster_compute() -> None:
    found = predict(MODEL, LOCAL, 2, blocks=BLOCKS, link=FREE, speed=100)
    assert found.microbatches_per_second == pytest.approx(10)


def test_a_thousand_stages() -> None:
    found = predict(MODEL, LOCAL, 1024, blocks=BLOCKS, link=FREE)
    assert found.microbatches_per_second == pytest.approx(1 / 10)
    zero_bubble = predict(MODEL, "ZB-H1", 1024, blocks=BLOCKS, link=FREE, microbatches=8)
    whole = predict(MODEL, "1F1B", 1024, blocks=BLOCKS, link=FREE, microbatches=8)
    assert whole.microbatches_per_second == pytest.approx(8 / (80 + 1023 * 10))
    assert zero_bubble.microbatches_per_second > whole.microbatches_per_second
