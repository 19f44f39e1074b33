"""What dividing a layer by its output channels over processes would give: are its bits the same, what remains to do?

    python benchmarks/channel_division.py                       # SmallConv on 32 x 32 images, for 2 and 4 processes
    python benchmarks/channel_division.py --batch-size 128 --processes 2 --repeats 60 --json division.json

A slice of a convolutional layer is a layer with fewer output channels and the same input: BatchNorm, activation,
pooling, weight gradient and optimizer are each channel's own. So the local step of such a layer, as the runtime makes
it, is what a process has to do for its share. The steps of all sizes take turns, channels last, with one thread, after
all have been warmed up; of each the median of its processor seconds counts, which other work disturbs less.

The bound on the gain: the best undivided stages' time over that of the best division, in which every process takes
layers and slices in order until its time is full. The gathering of latents, the copies of activations to several
processes and the wait for each other in every step come on top, and only lower it. Bits: whether a slice of the
library's convolution has the values of the whole, forward and in the weight gradient.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from unlocked.comparison.environment import environment
from unlocked.kernels.dispatch import get_backend
from unlocked.models import Block, small_conv
from unlocked.models.blocks import ConvBlock, OutputBlock
from unlocked.rules import LLS
from unlocked.runtime.network import build_layer, build_network
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.schedules.partition import partition
from unlocked.runtime.typed import to_plain
from unlocked.workers.fused import fused_step
from unlocked.workers.layer import Layer

Times = Mapping[str, Mapping[int, float]]
"""Layer -> output channels of a slice (all: the last) -> seconds of its local step."""
WHOLE = 0  # the key of a layer that is not cut
GRAIN = 16  # channels: a vector of AVX-512


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    times = measure(options.batch_size, options.repeats)
    for name, of in times.items():
        most = max(of)
        for channels, seconds in of.items():
            share = f"{channels} of {most} channels" if channels else "whole"
            print(f"{name:8} {share:20} {1e3 * seconds:7.2f} ms, 1/{of[most] / seconds:.2f} of the whole")
    same = bits(options.batch_size)
    for name, parts, what, is_same in same:
        print(f"{name:8} in {parts}, {what}: {'equal bits' if is_same else 'OTHER BITS'}")
    bounds = {}
    for processes in options.processes:
        before, after, cuts = undivided(times, processes), *divided(times, processes)
        bounds[processes] = before / after
        print(
            f"{processes} processes: at most {before / after:.2f} times the undivided pipeline "
            f"({1e3 * before:.2f} ms a step; {1e3 * after:.2f} ms: {'; '.join(cuts)})"
        )
    if options.json is not None:
        rows = [{"layer": n, "channels": c, "seconds": s} for n, of in times.items() for c, s in of.items()]
        checked = [dict(zip(("layer", "parts", "what", "equal"), row, strict=True)) for row in same]
        write_json(
            options.json, {"environment": to_plain(environment()), "rows": rows, "bits": checked, "bounds": bounds}
        )
    return 0


def measure(batch_size: int, repeats: int) -> Times:
    """All layers and slices, taking turns."""
    cases: dict[tuple[str, int], tuple[Layer, Tensor]] = {}
    x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for block in small_conv(in_channels=3, num_classes=10, image_size=32):
        if isinstance(block, ConvBlock):
            channels = len(block.conv.weight)
            for some in range(GRAIN, channels + 1, GRAIN):
                cases[block.name, some] = _layer(_slice(block, some), x), x
        else:
            cases[block.name, WHOLE] = _layer(block, x), x
        with torch.no_grad():
            x = block(x)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size) % 10
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in cases}
    for turn in range(repeats + 3):
        for key, (layer, given) in cases.items():
            began = time.process_time()
            layer.forward(given)
            layer.update(labels)
            if turn >= 3:
                taken[key].append(time.process_time() - began)
    found: dict[str, dict[int, float]] = {}
    for (name, channels), seconds in taken.items():
        found.setdefault(name, {})[channels] = statistics.median(seconds)
    return found


def _slice(block: ConvBlock, channels: int) -> ConvBlock:
    """The layer with so many of its output channels."""
    return ConvBlock(
        block.conv.in_channels,
        channels,
        name=block.name,
        pool=block.pool,
        pool_size=block.pool_size if block.pool == "average" else None,
        latent_size=block.latent_size,
    )


def _layer(block: Block, x: Tensor) -> Layer:
    """As the runtime trains it; an output layer behind it is there because a network ends with one."""
    with torch.no_grad():
        width = block(x[:2]).flatten(1).shape[1]
    blocks = [block] if block.is_output else [block, OutputBlock(width, 10)]
    network = build_network(blocks, input_shape=tuple(x.shape[1:]), num_classes=10, seed=0)
    step = fused_step(get_backend("auto", "cpu"))
    optimizer = partial(torch.optim.Adam, lr=1e-3, fused=True)
    return build_layer(
        network, 0, rule=LLS(temperature=1.0), optimizer=optimizer, device=torch.device("cpu"), step=step
    )


def undivided(times: Times, processes: int) -> float:
    """Seconds of the longest of the best stages."""
    whole = [of[max(of)] for of in times.values()]
    return max(sum(whole[i] for i in stage) for stage in partition(whole, min(processes, len(whole))))


def divided(times: Times, processes: int) -> tuple[float, list[str]]:
    """The same where convolutional layers may be cut, every `GRAIN` channels; and where they are."""
    low, high = 0.0, undivided(times, 1)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _fill(times, processes, middle) is not None else (middle, high)
    cuts = _fill(times, processes, high)
    assert cuts is not None
    return high, cuts


def _fill(times: Times, processes: int, most: float) -> list[str] | None:
    """Layers and slices in order, each process up to `most` seconds; None if they are too few."""
    room, cuts = [most] * processes, []
    at = 0
    for name, of in times.items():
        left = max(of)
        while True:
            fitting = [some for some, seconds in of.items() if some <= left and seconds <= room[at]]
            if fitting:
                some = max(fitting)
                room[at] -= of[some]
                if some < max(of):
                    cuts.append(f"{some} channels of {name} in process {at}")
                left -= some
                if left == 0:
                    break
            at += 1
            if at == processes:
                return None
    return cuts


def bits(batch_size: int) -> list[tuple[str, int, str, bool]]:
    """Layer, parts, what, and whether its slices have the values of the whole."""
    found = []
    x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for block in small_conv(in_channels=3, num_classes=10, image_size=32):
        if isinstance(block, ConvBlock):
            found += [(block.name, parts, *row) for parts in (2, 4) for row in _same(block.conv, x, parts)]
        with torch.no_grad():
            x = block(x)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
    return found


def _same(convolution: nn.Conv2d, x: Tensor, parts: int) -> list[tuple[str, bool]]:
    weight, bias = convolution.weight.detach(), convolution.bias
    assert bias is not None
    how = convolution.stride, convolution.padding
    whole = nn.functional.conv2d(x, weight, bias.detach(), *how)
    gradient = torch.randn_like(whole)
    at_weight = torch.nn.grad.conv2d_weight(x, weight.shape, gradient, *how)
    edges = [len(weight) * part // parts for part in range(parts + 1)]
    outs, grads = [], []
    for begin, end in itertools.pairwise(edges):
        own, at_out = weight[begin:end], gradient[:, begin:end].contiguous(memory_format=torch.channels_last)
        outs.append(nn.functional.conv2d(x, own, bias.detach()[begin:end], *how))
        grads.append(torch.nn.grad.conv2d_weight(x, own.shape, at_out, *how))
    return [
        ("forward", torch.equal(torch.cat(outs, 1), whole)),
        ("weight gradient", torch.equal(torch.cat(grads), at_weight)),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
