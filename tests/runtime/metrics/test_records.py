"""Records of a run: joining stages' parts, speeds, and the fan-out to sinks."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlocked.runtime.metrics.records import (
    EpochAggregator,
    EpochPart,
    RunInfo,
    Scores,
    StageProgress,
    rates_between,
)

INFO = RunInfo(
    model="m",
    dataset="d",
    engine="sequential",
    rule="LLS",
    stages=(("a", "b"), ("c",)),
    total=10,
    epochs=1,
    steps_per_epoch=10,
    batch_size=1,
)


def part(stage: int, epoch: int, last: int) -> EpochPart:
    return EpochPart(
        stage=stage,
        epoch=epoch,
        local_losses=((f"layer{stage}", 10.0 * stage + epoch),),
        seconds=stage + 1.0,
        train=Scores(loss=epoch + 0.5, acc1=50.0, acc5=90.0) if stage == last else None,
        evaluation=Scores(loss=epoch + 0.7, acc1=40.0, acc5=80.0) if stage == last and epoch % 2 == 0 else None,
    )


@given(
    stages=st.integers(1, 5), epochs=st.integers(1, 4), first=st.integers(0, 3), order=st.randoms(use_true_random=False)
)
def test_epochs_come_out_complete_and_in_order(stages: int, epochs: int, first: int, order: object) -> None:
    """Each stage sends its epochs in order; how the stages interleave does not matter."""
    pending = {stage: list(range(first, first + epochs)) for stage in range(stages)}
    aggregator = EpochAggregator(stages)
    results = []
    while pending:
        stage = order.choice(sorted(pending))  # type: ignore[attr-defined]
        results += aggregator.add(part(stage, pending[stage].pop(0), stages - 1))
        if not pending[stage]:
            del pending[stage]
    assert [result.epoch for result in results] == list(range(first, first + epochs))
    for result in results:
        assert result.local_losses == tuple((f"layer{s}", 10.0 * s + result.epoch) for s in range(stages))
        assert result.seconds == stages
        assert result.train_loss == result.epoch + 0.5
        assert result.eval_loss == (result.epoch + 0.7 if result.epoch % 2 == 0 else None)


def test_nothing_comes_out_before_the_last_part() -> None:
    for arrival in itertools.permutations(range(3)):
        aggregator = EpochAggregator(3)
        counts = [len(aggregator.add(part(stage, 0, 2))) for stage in arrival]
        assert counts == [0, 0, 1]


def test_repeated_part_changes_nothing() -> None:
    aggregator = EpochAggregator(1)
    assert len(aggregator.add(part(0, 0, 0))) == 1
    assert aggregator.add(part(0, 0, 0)) == []
    assert len(aggregator.add(part(0, 1, 0))) == 1


def test_bad_parts_are_refused() -> None:
    aggregator = EpochAggregator(2)
    with pytest.raises(ValueError, match="stage 2; valid: 0 to 1"):
        aggregator.add(part(2, 0, 2))
    with pytest.raises(ValueError, match="last stage"):
        aggregator.add(part(1, 0, 5))
    with pytest.raises(ValueError, match="at least 1"):
        EpochAggregator(0)


def progress(seconds: float, images: int = 0, busy: float = 0.0, position: int = 0) -> StageProgress:
    return StageProgress(
        stage=0, position=position, epoch=0, images=images, busy_seconds=busy, wait_seconds=0.0, seconds=seconds
    )


def test_rates_are_differences_over_time() -> None:
    rates = rates_between(progress(1.0, 100, 0.5, 10), progress(3.0, 500, 2.0, 40))
    assert rates is not None
    assert rates.images_per_second == 200.0
    assert rates.positions_per_second == 15.0
    assert math.isclose(rates.busy, 0.75)


def test_no_rates_without_time_and_no_share_above_one() -> None:
    assert rates_between(progress(1.0), progress(1.0)) is None
    rates = rates_between(progress(0.0), progress(1.0, busy=1.01))
    assert rates is not None
    assert rates.busy == 1.0


def test_layers_are_in_network_order() -> None:
    assert INFO.layers == ("a", "b", "c")
