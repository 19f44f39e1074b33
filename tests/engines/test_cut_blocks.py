"""Residual blocks that are cut inside: what skips a half travels with it, whatever the placement."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.data import ImageDataset, load_dataset
from unlocked.models.blocks import Origin
from unlocked.models.residual import _resnet
from unlocked.rules import LLS, BarlowTwins, InfoPro, Rule
from unlocked.runtime import RunResult, Streams, Trainer


def data() -> list[ImageDataset]:
    return [replace(d, images=d.images[:60], labels=d.labels[:60]) for d in load_dataset("digits")]


def run(rule: Rule, engine: Any, **options: Any) -> RunResult:
    blocks = _resnet("small", (4, 8), 1, False, 1, 10, 8, 0.1, None, True, 0)
    for block in blocks:
        block.origin = Origin()  # no network that anyone can ask for by name
    trainer = Trainer(
        blocks, rule=rule, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), engine=engine, seed=3, **options
    )
    train, test = data()
    return trainer.fit(train, epochs=2, batch_size=16, eval_data=test)


@pytest.mark.parametrize("rule", [LLS(), InfoPro, BarlowTwins])
def test_a_cut_inside_a_block_changes_no_bit(rule: Rule, tmp_path: Path) -> None:
    """Six stages: every edge but the first and the last is inside a block, or between two."""
    expected = run(rule, "sequential")
    saving: dict[str, Any] = {"snapshot_every": 6, "snapshot_dir": tmp_path}
    placed = run(rule, Streams(stages=6, queue_depth=2), **saving)
    assert [len(stage) for stage in placed.stages] == [1] * 6
    assert placed.weights_sha256 == expected.weights_sha256
    assert placed.epochs[-1].eval_loss == expected.epochs[-1].eval_loss
    resumed = run(rule, Streams(stages=2), resume=tmp_path / "step-00000006", **saving)
    assert resumed.weights_sha256 == expected.weights_sha256
