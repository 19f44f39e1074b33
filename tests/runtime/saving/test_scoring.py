"""Scoring data that is read ahead, and of epochs that leave their rest out."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unlocked.data.synthetic import load_synthetic
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.saving.scoring import score_snapshot, score_weights
from unlocked.runtime.saving.snapshots import find_snapshot
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


def test_a_snapshot_of_epochs_without_their_rest(tmp_path: Path) -> None:
    """Of 17 rows at 8 one is left over; the end of an epoch is after 2 steps, and so is that of a resumed one."""
    train, test = load_synthetic(num_train=17, num_test=9, num_classes=4, image_size=8, seed=2)

    def fit(drop_last: bool = True, **options: Any) -> RunResult:
        optimizer = partial(torch.optim.Adam, lr=1e-2)
        trainer = Trainer(small_conv(3, 4, 8), rule=LLS(), optimizer=optimizer, snapshot_every=2, **options)
        return trainer.fit(train, epochs=3, batch_size=8, eval_data=test, drop_last=drop_last)

    whole = fit(snapshot_dir=tmp_path)
    assert whole.steps == 6
    snapshot = find_snapshot(tmp_path / "step-00000004")
    found = score_snapshot(small_conv(3, 4, 8), snapshot, train, test, batch_size=8)
    assert found.loss == whole.epochs[1].eval_loss
    resumed = fit(snapshot_dir=tmp_path / "resumed", resume=snapshot.folder)
    assert resumed.weights_sha256 == whole.weights_sha256
    train = replace(train, images=train.images[:16], labels=train.labels[:16])
    with pytest.raises(ValueError, match="drop_last is False but was True"):
        fit(drop_last=False, snapshot_dir=tmp_path, resume=snapshot.folder)
    fit(drop_last=False, snapshot_dir=tmp_path / "all")
    with pytest.raises(ValueError, match="drop_last is True but was False"):
        fit(snapshot_dir=tmp_path, resume=tmp_path / "all" / "step-00000004")


def test_an_evaluation_too_small_for_a_layer_without_running_statistics() -> None:
    _, test = load_synthetic(num_train=1, num_test=5, num_classes=3, image_size=2, seed=2)
    model = [nn.Flatten(), nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 3)]
    weights = {"batchnorm1d2.block.body.weight": torch.ones(12), "batchnorm1d2.block.body.bias": torch.zeros(12)}
    weights |= {"linear3.block.body.weight": torch.ones(3, 12), "linear3.block.body.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"layer batchnorm1d2 .*5 evaluation rows in micro-batches of 4 give one of 1"):
        score_weights(model, weights, test, batch_size=4)
    assert score_weights(model, weights, test, batch_size=5).loss > 0
