"""What dividing a layer by its output channels over processes would give: are its bits the same, what remains to do?

    python benchmarks/channel_division.py                       # SmallConv on 32 x 32 images, in 2 and 4 parts
    python benchmarks/channel_division.py --batch-size 128 --parts 2 --repeats 30 --json division.json

For every layer: its block's convolution (forward and weight gradient, which the library computes) for all output
channels and for a slice of them; whether the slice's values are those of the whole, bit for bit; and processor seconds,
which other work on the machine disturbs less. The bound on the gain: the best undivided stages' time over the even
share of all the work there is when the layers between two processes are divided, which do more in parts than whole. It
takes neither the gathering of latents nor further copies of activations into account, which only lower it.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.comparison.environment import environment
from unlocked.models import small_conv
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.schedules.partition import partition
from unlocked.runtime.typed import to_plain


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for parts in options.parts for row in study(parts, options)]
    for row in rows:
        bits = ", ".join(f"{what} {'equal' if same else 'other bits'}" for what, same in row["bits"].items())
        print(
            f"{row['layer']:8} in {row['parts']}: {1e3 * row['whole_seconds']:7.2f} ms whole, "
            f"{1e3 * row['slice_seconds']:7.2f} ms a slice "
            f"({row['whole_seconds'] / row['slice_seconds']:.2f} times), {bits}"
        )
    bounds = {parts: bound(parts, [row for row in rows if row["parts"] == parts]) for parts in options.parts}
    for parts, most in bounds.items():
        print(f"{parts} processes: at most {most:.2f} times the speed of the undivided pipeline")
    if options.json is not None:
        write_json(options.json, {"environment": to_plain(environment()), "rows": rows, "bounds": bounds})
    return 0


def study(parts: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every convolution of the network, whole and a slice."""
    rows = []
    x = torch.randn(options.batch_size, 3, 32, 32)
    for block in small_conv(in_channels=3, num_classes=10, image_size=32):
        convolution = next((one for one in block.modules() if isinstance(one, nn.Conv2d)), None)
        following = block(x).detach()
        if convolution is not None:
            rows.append({"layer": block.name, "parts": parts, **divided(convolution, x, parts, options.repeats)})
        x = following
    return rows


def bound(processes: int, rows: Sequence[dict[str, Any]]) -> float:
    """On the gain in speed."""
    whole = [row["whole_seconds"] for row in rows]
    stages = partition(whole, min(processes, len(whole)))
    undivided = max(sum(whole[i] for i in stage) for stage in stages)
    more = sorted(max(row["parts"] * row["slice_seconds"] - row["whole_seconds"], 0.0) for row in rows)
    return undivided / ((sum(whole) + sum(more[: processes - 1])) / processes)


def divided(convolution: nn.Conv2d, x: Tensor, parts: int, repeats: int) -> dict[str, Any]:
    """Bits of all slices, and seconds of the first one."""
    weight, bias = convolution.weight.detach(), convolution.bias
    bias = None if bias is None else bias.detach()
    whole = torch.nn.functional.conv2d(x, weight, bias, convolution.stride, convolution.padding)
    gradient = torch.randn_like(whole)

    def step(begin: int, end: int) -> tuple[Tensor, Tensor]:
        own = weight[begin:end].contiguous(), None if bias is None else bias[begin:end].contiguous()
        out = torch.nn.functional.conv2d(x, *own, convolution.stride, convolution.padding)
        at_out = gradient[:, begin:end].contiguous()
        at_weight = torch.nn.grad.conv2d_weight(x, own[0].shape, at_out, convolution.stride, convolution.padding)
        return out, at_weight

    channels = len(weight)
    edges = [channels * part // parts for part in range(parts + 1)]
    outs, weights = zip(*(step(*pair) for pair in itertools.pairwise(edges)), strict=True)
    full = step(0, channels)
    return {
        "channels": channels,
        "bits": {
            "forward": torch.equal(torch.cat(outs, 1), full[0]),
            "weight gradient": torch.equal(torch.cat(weights), full[1]),
        },
        "whole_seconds": seconds(lambda: step(0, channels), repeats),
        "slice_seconds": seconds(lambda: step(edges[0], edges[1]), repeats),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Of this process's processor time, the median."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
