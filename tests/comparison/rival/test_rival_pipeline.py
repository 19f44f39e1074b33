"""Backpropagation's pipeline: where its stages lie, and how a micro-batch is cut."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from unlocked.comparison.rival.pipeline import BpPipeline, chunks_for, owner
from unlocked.comparison.rival.worker import _follow
from unlocked.rules import Classification
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item


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


CLASSES: Any = SimpleNamespace(task=Classification(), sums={})
"""What of a network is asked for its figures."""


class Spoilt:
    """What `_follow` asks of a pipeline, with a loss of its own choice in training or in evaluation."""

    last_owner = 0

    def __init__(self, loss: float, test_loss: float) -> None:
        self.loss, self.scores = torch.zeros((), dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        self._found = loss, test_loss

    def train(self, item: Item) -> None:
        self.loss += self._found[0]

    def infer(self, items: Sequence[Item]) -> None:
        self.scores[0] += self._found[1]


@pytest.mark.parametrize(("loss", "test_loss"), [(float("nan"), 1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_loss_that_is_no_number_has_no_accuracy(loss: float, test_loss: float) -> None:
    plan = StreamPlan(epochs=1, train_size=4, batch_size=2, eval_size=2, eval_batch_size=2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"the (test )?loss of epoch 0 is (nan|inf)"):
            _follow(plan, Spoilt(loss, test_loss), CLASSES, 0.0)  # type: ignore[arg-type]
        epochs, images = _follow(plan, Spoilt(1.0, 1.0), CLASSES, 0.0)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    assert (len(epochs), images) == (1, 4)


def test_scores_that_are_no_number_are_no_hit() -> None:
    labels = torch.tensor([0, 1, 2])
    logits = torch.nn.functional.one_hot(labels).float()
    logits[1, 1] = float("nan")
    rival = SimpleNamespace(scores=torch.zeros(3, dtype=torch.float64), network=CLASSES, _labels=lambda item: labels)
    BpPipeline._score(rival, logits, SimpleNamespace(kind="evaluate"))  # type: ignore[arg-type]
    assert rival.scores[1] == 2
