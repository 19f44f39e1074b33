"""What surrounds the convolutions of a step on a CPU: from the bare library call out to the whole run.

Used by benchmarks/cpu_step.py (`--only surroundings`). Every row is a whole step's milliseconds, of SmallConv, LLS and
Adam at batch 64; rows nest, so that the difference of two is what lies between them.
"""

import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from cpu_operations import BATCH, batch, build_layers, make_network, recorded, run_layers
from torch import Tensor, nn

from unlocked.data.registry import load_dataset
from unlocked.rules import LLS
from unlocked.runtime import Trainer

__all__ = ["surroundings"]

_backward = torch.ops.aten.convolution_backward


def surroundings(threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Milliseconds per step: one median for each round, in which all take turns.

    Returns:
        convolutions alone: forward and weight gradient, each repeated by itself, so its operands stay in the cache.
        convolutions in the step, kernels in the step: the library's and ours, timed where they stand.
        step: the layers' forward and update on one micro-batch that is there.
        run: a whole training run of `steps` steps, rows gathered, shuffled and scaled by the same threads.
        page faults: of a step in the run; a count, no time.
    """
    torch.set_num_threads(threads)
    layers = build_layers("cpp")
    images, labels = batch()
    calls = _convolutions(layers, images)
    run = _runner(threads, steps)
    found: dict[str, list[float]] = {}
    for name in ("convolutions alone", "convolutions in the step", "kernels in the step", "step", "run", "page faults"):
        found[name] = []
    for _ in range(3):
        run_layers(layers, images, labels)
    for _ in range(rounds):
        found["convolutions alone"].append(sum(1e3 * _median(call, steps) for call in calls))
        inside, ours = _inside(layers, images, labels, steps)
        found["convolutions in the step"].append(inside)
        found["kernels in the step"].append(ours)
        found["step"].append(1e3 * _median(partial(run_layers, layers, images, labels), steps))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        found["run"].append(1e3 * run() / steps)
        found["page faults"].append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / steps)
    return {"threads": threads, "milliseconds": found}


def _convolutions(layers: list[Any], images: Tensor) -> list[Callable[[], object]]:
    calls: list[Callable[[], object]] = []
    x = images
    for layer in layers:
        conv = getattr(layer.block, "conv", None)
        following = layer.forward(x)
        if isinstance(conv, nn.Conv2d):
            weight = conv.weight.detach()
            grad = F.conv2d(x, weight, None, conv.stride, conv.padding)
            calls.append(partial(F.conv2d, x, weight, None, conv.stride, conv.padding))
            options = (conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [False, True, False])
            calls.append(partial(_backward, grad, x, weight, None, *options))
        layer.update(torch.zeros(len(images), dtype=torch.int64))
        x = following
    return calls


def _inside(layers: list[Any], images: Tensor, labels: Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of a step in the library's convolutions, and in our kernels, head and optimizer."""
    sums = {True: 0.0, False: 0.0}
    for (_, operation), values in recorded(layers, images, labels, steps).items():
        sums[operation in ("convolution", "weight gradient")] += 1e3 * statistics.median(values)
    return sums[True], sums[False]


def _runner(threads: int, steps: int) -> Callable[[], float]:
    """Trains for `steps` micro-batches; gives the seconds that the training took."""
    train, _ = load_dataset("synthetic", num_train=BATCH * steps, num_test=10)

    def run() -> float:
        optimizer = partial(torch.optim.Adam, lr=0.01, fused=True)
        trainer = Trainer(make_network().blocks, rule=LLS(), optimizer=optimizer, threads=threads)
        return trainer.fit(train, epochs=1, batch_size=BATCH).train_seconds

    return run


def _median(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
