"""The partitioner against every possible split."""

import math
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.partition import check_ownership, parse_stages, partition

NAMES = ["conv1", "conv2", "conv-3", "fc", "head"]


def quality(costs: list[float], parts: list[range]) -> tuple[Fraction, Fraction]:
    sums = [sum((Fraction(costs[layer]) for layer in part), Fraction(0)) for part in parts]
    return max(sums), sum((s * s for s in sums), Fraction(0))


def every_split(num_layers: int, num_stages: int) -> list[list[range]]:
    cuts = combinations(range(1, num_layers), num_stages - 1)
    return [[range(a, b) for a, b in zip((0, *cut), (*cut, num_layers), strict=True)] for cut in cuts]


# Small integers make ties, floats of very different sizes make sums that do not fit a float.
COSTS = st.lists(st.integers(1, 4).map(float) | st.floats(1e-12, 1e12), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(COSTS, st.data())
def test_no_split_is_better(costs: list[float], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    parts = partition(costs, num_stages)
    assert parts in every_split(len(costs), num_stages)
    check_ownership(parts, len(costs))
    assert quality(costs, parts) == min(quality(costs, split) for split in every_split(len(costs), num_stages))


def test_ties_go_to_the_balanced_split() -> None:
    # The largest stage costs 10 in any case; the other layers must not sit with each other.
    assert partition([10.0, 1.0, 1.0, 1.0, 1.0], 3) == [range(1), range(1, 3), range(3, 5)]


def test_the_largest_stage_counts_before_the_balance() -> None:
    # Stages of 6, 2 and 3 have the smaller sum of squares (49 against 51), but 6 is more than 5.
    assert partition([1.0, 5.0, 2.0, 3.0], 3) == [range(1), range(1, 2), range(2, 4)]


def test_many_layers() -> None:
    costs = [1.0 + (layer * 7919 % 13) for layer in range(300)]
    parts = partition(costs, 64)
    check_ownership(parts, 300)
    assert max(sum(costs[layer] for layer in part) for part in parts) <= sum(costs) / 64 + max(costs)


def test_more_stages_than_layers_names_both() -> None:
    with pytest.raises(ValueError, match=r"5 stages .* only 3.*at most 3 stages"):
        partition([1.0, 1.0, 1.0], 5)


@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_costs_that_are_no_costs(cost: float) -> None:
    with pytest.raises(ValueError, match="cost of layer 1 is"):
        partition([1.0, cost], 1)


def test_nothing_to_split() -> None:
    with pytest.raises(ValueError, match="no layers"):
        partition([], 1)
    with pytest.raises(ValueError, match="num_stages=0"):
        partition([1.0], 0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "no stages"),
        ([range(2), range(2, 2), range(2, 3)], "stage 1 owns no layer"),
        ([range(2), range(1, 3)], "stage 1 claims layer 1, which already has an owner"),
        ([range(1), range(2, 3)], "stage 1 has layer 2 where layer 1"),
        ([range(1), range(1, 5)], "stage 1 claims layer 3, but the model has only layers 0 to 2"),
        ([range(-1, 3)], "stage 0 claims layer -1"),
        ([range(2)], "no stage owns layer 2"),
        ([range(2, -1, -1)], "stage 0 has layer 2 where layer 0"),
    ],
)
def test_ownership(parts: list[range], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ownership(parts, 3)


@pytest.mark.parametrize(
    "text", ["0-1,2,3-4", " 0 - 1, 2 ,3-4", "conv1-conv2,conv-3,fc-head", "conv1-1,conv-3-conv-3,3-head"]
)
def test_explicit_stages(text: str) -> None:
    assert parse_stages(text, NAMES) == [range(2), range(2, 3), range(3, 5)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.data())
def test_explicit_stages_round_trip(num_layers: int, data: st.DataObject) -> None:
    splits = every_split(num_layers, data.draw(st.integers(1, min(num_layers, 4))))
    parts = data.draw(st.sampled_from(splits))
    text = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    assert parse_stages(text, [f"layer{number}" for number in range(num_layers)]) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-1,,2-4", "'' is neither a layer nor first-last"),
        ("0-1,conv9,3-4", "'conv9' is neither"),
        ("1-0,2-4", "'1-0' runs backwards. Write 0-1"),
        ("0-1,3-4", r"layer 3 where layer 2 should come.*2 conv-3"),
        ("0-2,2-4", "layer 2, which already has an owner"),
        ("0-7", "only layers 0 to 4"),
        ("0-1,2", "no stage owns layer 3"),
    ],
)
def test_explicit_stages_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_stages(text, NAMES)
