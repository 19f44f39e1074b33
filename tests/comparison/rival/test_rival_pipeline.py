"""Backpropagation's pipeline: where its stages lie, and how a micro-batch is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from unlocked.comparison.rival.pipeline import chunks_for, owner


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_stages_lie_where_torch_puts_them(processes: int) -> None:
    for engine, style in (("zero-bubble", "loop"), ("ZBV", "v")):
        theirs = generate_stage_to_rank_mapping(processes, 2 * processes, style)
        assert {s: owner(s, engine, processes) for s in range(2 * processes)} == theirs


@given(rows=st.integers(1, 300), chunks=st.integers(1, 16))
def test_chunks_are_equal_and_as_many_as_fit(rows: int, chunks: int) -> None:
    found = chunks_for(rows, chunks)
    fitting = [n for n in range(1, chunks + 1) if rows % n == 0 and rows // n >= 2]
    assert found == max(fitting, default=1)
