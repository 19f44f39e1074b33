"""Scoring data that is read ahead."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from unlocked.data.synthetic import load_synthetic
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.runtime.saving.scoring import score_weights
from unlocked.workers.prefetch import Prefetcher


def test_streamed_data_is_scored_in_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for memory must not be asked for as one micro-batch; the figures are the resident data's."""
    train, test = load_synthetic(num_train=16, num_test=37, num_classes=4, image_size=8, seed=2)
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    run = Trainer(small_conv(3, 4, 8), rule=LLS(), optimizer=optimizer)
    result = run.fit(train, epochs=1, batch_size=8, eval_data=test, eval_batch_size=10)
    sizes: list[int] = []
    original = Prefetcher.__init__

    def prefetcher(self: Prefetcher, *arguments: Any, rows: int, **options: Any) -> None:
        sizes.append(rows)
        original(self, *arguments, rows=rows, **options)

    monkeypatch.setattr(Prefetcher, "__init__", prefetcher)
    found = [
        score_weights(small_conv(3, 4, 8), result.weights, replace(test, streamed=streamed), batch_size=10)
        for streamed in (None, True)
    ]
    assert sizes == [10]
    assert found[0] == found[1]
    assert found[0].loss == result.epochs[-1].eval_loss
