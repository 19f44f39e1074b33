"""The library's own layers and stages against the golden trajectories: a few training steps of the authors' code.

[Note: biases] A bias in front of BatchNorm has no gradient: the mean is subtracted again. Autograd computes rounding
noise for it, which Adam turns into steps of the full learning rate. Such biases, and what they shift (the running mean
and through it the evaluation), differ between any two correct programs by what the noise can move them; all else is
compared tightly. SGD leaves the noise small, and its trajectories agree in everything.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import Golden, check_samples, golden_batches, golden_files, golden_parameters, load_golden
from torch import Tensor, nn

from unlocked.kernels import reference
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.workers.actions import Item
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.layer import Layer, Step, StepFactory
from unlocked.workers.stage import Stage

# As in the kernels' conftest: Triton reads it when a kernel is decorated, hence before any import of the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

CPU = torch.device("cpu")
LOCAL = [path for path in golden_files() if "-BP-" not in path.stem]
SMALL = [path for path in LOCAL if "SmallConv" in path.stem]


@dataclass
class Trajectory:
    """What one run of the library has to say about a golden file's steps."""

    logits: list[Tensor]
    losses: list[Tensor]
    parameters: dict[str, Tensor]  # by the authors' name
    buffer_sums: dict[str, float]
    eval_logits: Tensor
    layers: list[Layer]


def _network(meta: dict[str, Any]) -> Network:
    channels, side, classes = meta["in_channels"], meta["image"], meta["n_classes"]
    blocks = get_model(meta["model"], in_channels=channels, num_classes=classes, image_size=side)
    network = build_network(
        blocks, input_shape=(channels, side, side), num_classes=classes, seed=0, keep_weights=True
    )
    return backpropagation_network(network) if meta["training_mode"] == "BP" else network


def _optimizer(meta: dict[str, Any]) -> Callable[[list[nn.Parameter]], Any]:
    lr, decay = meta["lr"], meta["weight_decay"]
    if meta["optimizer"] == "SGD":
        return partial(torch.optim.SGD, lr=lr, momentum=meta["momentum"], weight_decay=decay)
    if meta["optimizer"] == "Adam":
        return partial(torch.optim.Adam, lr=lr, weight_decay=decay)
    library = pytest.importorskip("schedulefree")
    return partial(library.AdamWScheduleFree, lr=lr, weight_decay=decay)


def _layers(meta: dict[str, Any], step: Callable[[int], StepFactory | None]) -> tuple[list[Layer], dict[str, Tensor]]:
    """The library's layers with the golden start values, and their parameters by the authors' names."""
    network = _network(meta)
    mode = meta["training_mode"]
    rule: Any = []
    if mode != "BP":
        rule = get_rule(
            mode,
            temperature=meta["temperature"],
            label_smoothing=meta["label_smoothing"],
            waveform=meta["waveform"],
        )
    layers = [
        build_layer(network, i, rule=rule, optimizer=_optimizer(meta), device=CPU, step=step(i))
        for i in range(len(network.blocks))
    ]
    values = golden_parameters(meta)
    found = [p for layer in layers for module in (layer.rule, layer.block) for p in module.parameters()]
    named = dict(zip(values, found, strict=True))
    with torch.no_grad():
        for name, value in values.items():
            assert named[name].shape == value.shape, name
            named[name].copy_(value)
    return layers, dict(named)


def run(golden: Golden, step: Callable[[int], StepFactory | None] = lambda index: None, steps: int = 0) -> Trajectory:
    """Trains as the golden file did; `step` chooses each layer's step, `steps` fewer steps than the file has."""
    meta = golden.meta
    layers, parameters = _layers(meta, step)
    stage = Stage(0, layers)
    images, labels = golden_batches(meta)
    images = images.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(*images.shape)
    logits, losses = [], []
    for s in range(steps or meta["steps"]):
        item = Item(s, "train", 0, s, meta["batch"], False)
        stage.begin_epoch()
        logits.append(stage.forward(item, _channels_last(images[s]), labels[s]).clone())
        stage.update(item)
        losses.append(stage.read_sums()[:-2, 0].float() / meta["batch"])
    parameters = {name: value.detach().clone() for name, value in parameters.items()}
    buffers = [(key, b) for layer in layers for key, b in layer.block.named_buffers() if "running" in key]
    assert len(buffers) == len(meta["buffer_sums"])
    sums = {name: float(b.sum()) for name, (_, b) in zip(meta["buffer_sums"], buffers, strict=True)}
    # Not through Stage.evaluate: the schedule-free file was evaluated at the training weights.
    x = _channels_last(images[0])
    with torch.no_grad():
        for layer in layers:
            x = layer.block.eval()(x)
    return Trajectory(logits, losses, parameters, sums, x, layers)


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _distance(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, Euclidean."""
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30))


def _noise_only(name: str, meta: dict[str, Any]) -> bool:
    """A bias in front of BatchNorm; see [Note: biases]."""
    return name.endswith((".conv.bias", "linear_block1.block.linear.bias"))


