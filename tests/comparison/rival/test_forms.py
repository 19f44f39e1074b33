"""How pipelines of backpropagation are cut: the forms that are tried."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.comparison.request import LayerCosts
from unlocked.comparison.rival.forms import balanced_parts, forms_to_try
from unlocked.comparison.rival.pipeline import owner


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=4, max_size=8),
    engine=st.sampled_from(["zero-bubble", "ZBV"]),
)
def test_two_stages_per_process_are_balanced(costs: list[int], engine: str) -> None:
    def busiest(parts: Any) -> int:
        return max(
            sum(sum(costs[a:b]) for s, (a, b) in enumerate(parts) if owner(s, engine, 2) == rank) for rank in (0, 1)
        )

    parts = balanced_parts(costs, engine, 2)
    assert [i for a, b in parts for i in range(a, b)] == list(range(len(costs)))
    assert all(a < b for a, b in parts)
    every = [list(zip((0, *cuts), (*cuts, len(costs)), strict=True)) for cuts in combinations(range(1, len(costs)), 3)]
    assert busiest(parts) == min(map(busiest, every))


def test_both_splits_are_tried_where_they_differ() -> None:
    costs = LayerCosts(backpropagation=(1.0, 5.0, 1.0, 1.0, 1.0), local=(4.0, 1.0, 1.0, 1.0, 1.0))
    forms = forms_to_try("1F1B", costs, processes=2, batch_size=60, chunks=None)
    assert {form.parts for form in forms} == {((0, 2), (2, 5)), ((0, 1), (1, 5))}
    assert sorted(form.chunks for form in forms) == [2, 2, 4, 4], "8 does not divide 60, and 1F1B refuses 1"
    with pytest.raises(ValueError, match="ZBV holds 2 stages per process, 6 in all, for 5 layers"):
        forms_to_try("ZBV", costs, processes=3, batch_size=60, chunks=None)
