"""Blocks of a user's own, of every kind of step: the same bits on every engine, cut anywhere, and after a resume."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_blocks import CASES, Probe
from torch import nn

from unlocked.models import Block
from unlocked.rules import LLS
from unlocked.runtime import Streams, Trainer

NAMES = (
    *("plain", "pooled", "uneven", "pools", "depthwise", "conv1d", "group", "residual", "dropout", "parameter"),
    *("encoder", "attention", "attention of many tokens", "chunks of many tokens", "summed", "in part"),
    "pooled inside",
)


def _blocks(name: str) -> tuple[list[nn.Module], torch.Tensor]:
    """The case's block twice over, where its output has the shape of its input, and a classifier."""
    make, x, _ = CASES["residual" if name == "in part" else name]
    block = make()
    block.name = "first"
    if name == "in part":
        block = Block("first", nn.Sequential(*(block.body, nn.InstanceNorm2d(16), nn.Conv2d(16, 16, 1))), latent_size=2)
    with torch.no_grad():
        given = block.eval()(x)
    block.train()
    torch.manual_seed(2)
    second: list[nn.Module] = [nn.Flatten(), nn.Linear(given[0].numel(), 12), nn.GELU(), nn.Linear(12, 8)]
    third = nn.Sequential(nn.Linear(8, 5))
    return [block, Block("second", nn.Sequential(*second), latent_size=8), Block("third", third, is_output=True)], x


def _digest(name: str, precision: str = "fp32", **options: Any) -> str:
    blocks, x = _blocks(name)
    generator = torch.Generator().manual_seed(3)
    samples = torch.randn(40, *x.shape[1:], generator=generator)
    data = samples, torch.arange(40) % 5
    steps = options.pop("max_steps", 6)
    optimizer = partial(torch.optim.Adam, lr=0.01)
    rule = options.pop("rule", LLS())
    trainer = Trainer(blocks, rule=rule, optimizer=optimizer, precision=precision, **options)
    return trainer.fit(data, epochs=2, batch_size=12, max_steps=steps, eval_data=data).weights_sha256


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_on_every_engine_and_after_a_resume(name: str, tmp_path: Path) -> None:
    expected = _digest(name)
    assert _digest(name, engine=Streams(stages=2)) == expected
    assert _digest(name, engine=Streams(stages=3)) == expected
    saved = {"snapshot_dir": tmp_path, "snapshot_every": 2}
    assert _digest(name, **saved) == expected
    earlier = sorted(tmp_path.iterdir())[0]
    assert _digest(name, resume=earlier, engine=Streams(stages=2)) == expected
    half = _digest(name, "bf16")
    assert half != expected
    assert _digest(name, "bf16", engine=Streams(stages=3)) == half


@pytest.mark.parametrize("name", ["residual", "dropout", "chunks of many tokens", "in part"])
def test_the_same_bits_under_a_rule_that_autograd_follows(name: str, tmp_path: Path) -> None:
    expected = _digest(name, rule=Probe)
    assert _digest(name, rule=Probe, snapshot_dir=tmp_path, snapshot_every=2) == expected
    assert _digest(name, rule=Probe, engine=Streams(stages=3)) == expected
    earlier = sorted(tmp_path.iterdir())[0]
    assert _digest(name, rule=Probe, resume=earlier, engine=Streams(stages=2)) == expected
