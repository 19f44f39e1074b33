"""Convolutions with fewer multiplications (`--kernels cpp_winograd`) beside the library's direct ones: time and error.

    python benchmarks/winograd.py --threads 2 --json winograd.json     # some ten minutes on two cores
    python benchmarks/winograd.py --networks SmallConv --steps 20
    python benchmarks/winograd.py --networks VGG8B --rule PredictiveSimilarity --no-layers --steps 1

Three tables. Whole local steps of a network (LLS or another rule of activations and labels, whose own convolutions
count; Adam, batch 64, 32 x 32 images), both kinds in turns. Each 3 x 3 convolution of VGG8, forward and the kernel's
gradient, both kinds in turns: milliseconds, of the wall and of the processor. Errors against float64 as multiples of
the direct sum's, of tiles of 2 x 2 outputs, which are built, and of 4 x 4, which are not: these by plain products of
the library, with the usual points of interpolation (0, 1, -1, 2, -2) and with better ones.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.comparison.environment import environment
from unlocked.kernels.cpp import winograd
from unlocked.models import get_model
from unlocked.rules import LLS, OTHER_RULES, Rule
from unlocked.runtime.network import build_layer, build_network
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain
from unlocked.workers.fused import choose_step
from unlocked.workers.layer import Layer

__all__ = ["main"]

CPU = torch.device("cpu")
BATCH = 64
LAYERS = ((128, 256, 32), (256, 256, 16), (256, 512, 16), (512, 512, 8), (512, 512, 4))  # VGG8: in, out, side
POINTS = {"0, 1, -1, 2, -2": (0.0, 1.0, -1.0, 2.0, -2.0), "0, 1, -1, 1/2, -2": (0.0, 1.0, -1.0, 0.5, -2.0)}
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups
CONVOLVING = ("PredictiveSimilarity", "AugLocal", "DGL", "MonoForward")
RULES: dict[str, Rule] = {"LLS": LLS(), **{name: OTHER_RULES[name] for name in CONVOLVING}}
Work = Callable[[], object]


def main() -> int:
    options = parse()
    if problem := winograd.unavailable("cpu"):
        raise SystemExit(problem)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"environment": to_plain(environment()), "threads": options.threads, "batch": BATCH}
    found["networks"] = [network(name, options.rule, options.steps, options.rounds) for name in options.networks]
    if not options.no_layers:
        found["layers"] = [layer(*sizes, options.rounds) for sizes in LAYERS]
        found["errors"] = [errors(*sizes) for sizes in ((128, 256, 16), (512, 512, 8))]
    if options.json is not None:
        write_json(options.json, found)
    return 0


def network(name: str, rule: str, steps: int, rounds: int) -> dict[str, Any]:
    """Images/s of whole local steps; one median per round."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), generator=generator)
    kinds = {kernels: partial(_step, _layers(name, rule, kernels), x, labels) for kernels in ("cpp", "cpp_winograd")}
    times = in_turns(kinds, rounds, steps)
    rates = {kind: [BATCH / wall for wall, _ in pairs] for kind, pairs in times.items()}
    row = {"network": name, "rule": rule, "images_per_second": rates, **_ratios(times)}
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    print(f"{name}, {rule}: {medians['cpp']:.0f} -> {medians['cpp_winograd']:.0f} images/s, {_said(row)}", flush=True)
    return row


def layer(channels: int, outputs: int, side: int, rounds: int) -> dict[str, Any]:
    """One convolution, forward and its kernel's gradient."""
    x, weight, grad = tensors(BATCH, channels, outputs, side)
    row: dict[str, Any] = {"channels": channels, "outputs": outputs, "side": side}
    asked = [False, True, False]
    backward = torch.ops.aten.convolution_backward
    works: dict[str, dict[str, Work]] = {
        "forward": {
            "cpp": lambda: F.conv2d(x, weight, None, *GEOMETRY),
            "cpp_winograd": lambda: winograd.convolution(x, weight, None, *GEOMETRY),
        },
        "kernel's gradient": {
            "cpp": lambda: backward(grad, x, weight, None, *GEOMETRY[:3], False, [0, 0], 1, asked),
            "cpp_winograd": lambda: winograd.convolution_backward(grad, x, weight, *GEOMETRY, asked),
        },
    }
    for what, kinds in works.items():
        times = in_turns(kinds, rounds, 3)
        direct, own = (statistics.median(wall for wall, _ in times[kind]) for kind in kinds)
        row[what] = {"direct_seconds": direct, "filtered_seconds": own, **_ratios(times)}
        print(
            f"{channels} -> {outputs} at {side}, {what}: {1e3 * direct:.1f} -> {1e3 * own:.1f} ms, {_said(row[what])}"
        )
    return row


def errors(channels: int, outputs: int, side: int) -> dict[str, Any]:
    """Root mean square errors as multiples of the direct sum's."""
    x, weight, grad = tensors(8, channels, outputs, side)
    x = x.relu()
    of_kernel = (*GEOMETRY[:3], False, [0, 0], 1, [False, True, False])
    backward = partial(torch.ops.aten.convolution_backward)
    exact = F.conv2d(x.double(), weight.double(), None, *GEOMETRY)
    exact_grad = backward(grad.double(), x.double(), weight.double(), None, *of_kernel)[1]
    direct = _error(F.conv2d(x, weight, None, *GEOMETRY), exact)
    direct_grad = _error(backward(grad, x, weight, None, *of_kernel)[1], exact_grad)
    own = winograd.convolution_backward(grad, x, weight, *GEOMETRY, [False, True, False])[1]
    assert own is not None
    forward = _error(winograd.convolution(x, weight, None, *GEOMETRY), exact)
    multiples = {"2 x 2": (forward / direct, _error(own, exact_grad) / direct_grad)}
    for name, points in POINTS.items():
        forward_4, grad_4 = larger_tiles(x, weight, grad, points)
        multiples[f"4 x 4, {name}"] = (_error(forward_4, exact) / direct, _error(grad_4, exact_grad) / direct_grad)
    for name, (one, other) in multiples.items():
        print(f"error of {name}, {channels} -> {outputs}: {one:.2f} of the direct one's, gradient {other:.2f}")
    return {"channels": channels, "outputs": outputs, "side": side, "direct": [direct, direct_grad], "times": multiples}


def larger_tiles(x: Tensor, weight: Tensor, grad: Tensor, points: Sequence[float]) -> tuple[Tensor, Tensor]:
    """F(4 x 4, 3 x 3) and its adjoint in float32, by the library's products: the result and the kernel's gradient."""
    of_input, of_kernel, of_output = (torch.from_numpy(m).float() for m in matrices(points, 4))
    tiles = F.pad(x, (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)
    inputs = torch.einsum("ij,bchwjk,lk->ilbhwc", of_input, tiles, of_input).flatten(2, 4).flatten(0, 1)
    kernel = torch.einsum("ij,kcjl,nl->inck", of_kernel, weight, of_kernel).flatten(0, 1)
    batch, outputs, height, width = grad.shape
    products = torch.bmm(inputs, kernel).view(6, 6, batch, height // 4, width // 4, outputs)
    result = torch.einsum("ij,jlbhwk,ml->bkhiwm", of_output, products, of_output).reshape(grad.shape)
    tiles = grad.unfold(2, 4, 4).unfold(3, 4, 4)
    spread = torch.einsum("ji,bkhwjl,ln->inbhwk", of_output, tiles, of_output).flatten(2, 4).flatten(0, 1)
    summed = torch.bmm(inputs.transpose(1, 2), spread).view(6, 6, x.shape[1], outputs)
    return result, torch.einsum("ij,inck,nl->kcjl", of_kernel, summed, of_kernel)


def matrices(points: Sequence[float], side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T, G and A^T of F(side, 3) for finite points of interpolation and infinity (Toom and Cook's construction): B^T
    is what makes A^T [(G g) * (B^T d)] the convolution for all g and d."""
    count = side + 2
    spread = np.array([[p**i for p in points] + [float(i == side - 1)] for i in range(side)])
    scale = [np.prod([p - q for q in points if q != p]) for p in points]
    kernel = np.array([[p**j / s for j in range(3)] for p, s in zip(points, scale, strict=True)] + [[0.0, 0.0, 1.0]])
    known = np.array([spread[i] * kernel[:, j] for i in range(side) for j in range(3)])
    wanted = np.array([[float(k == i + j) for k in range(count)] for i in range(side) for j in range(3)])
    return np.linalg.lstsq(known, wanted, rcond=None)[0], kernel, spread


def tensors(batch: int, channels: int, outputs: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, kernel and the result's gradient, channels last."""
    sizes = ((batch, channels, side, side), (outputs, channels, 3, 3), (batch, outputs, side, side))
    x, weight, grad = (torch.randn(size).contiguous(memory_format=torch.channels_last) for size in sizes)
    return x, weight * (2 / (9 * channels)) ** 0.5, grad


def in_turns(kinds: Mapping[str, Work], rounds: int, calls: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the wall and of the processor per call: medians of `calls`, a pair for each round."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for work in kinds.values():
        work()
    for _ in range(rounds):
        for kind, work in kinds.items():
            taken = [_seconds(work) for _ in range(calls)]
            times[kind].append((statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken)))
    return times


def _seconds(work: Work) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def _ratios(times: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """How many times as fast, by the wall and by the processor's time: the median, the least, the most."""
    pairs = list(zip(times["cpp"], times["cpp_winograd"], strict=True))
    found = {}
    for place, clock in enumerate(("wall", "processor")):
        ratios = [direct[place] / own[place] for direct, own in pairs]
        found[clock] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return {"times_as_fast": found}


def _said(row: Mapping[str, Any]) -> str:
    wall, processor = (row["times_as_fast"][clock] for clock in ("wall", "processor"))
    return (
        f"{wall['median']:.2f} times ({wall['least']:.2f} to {wall['most']:.2f}), processor {processor['median']:.2f}"
    )


def _layers(name: str, rule: str, kernels: str) -> list[Layer]:
    model = get_model(name, in_channels=3, num_classes=10, image_size=32, dropout=0.0)
    made = build_network(model, input_shape=(3, 32, 32), num_classes=10, seed=0)
    optimizer = partial(torch.optim.Adam, lr=0.01, fused=True)
    chosen = RULES[rule]
    return [
        build_layer(made, i, rule=chosen, optimizer=optimizer, device=CPU, step=choose_step(kernels, CPU))
        for i in range(len(made.blocks))
    ]


def _step(layers: Sequence[Layer], x: Tensor, labels: Tensor) -> None:
    for one in layers:
        x = one.forward(x)
        one.update(labels)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["VGG8", "SmallConv"], metavar="NAME")
    parser.add_argument("--rule", default="LLS", choices=RULES, help="that the networks train by (default: LLS)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5, help="of a network in a round (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="in which both kinds take turns (default: 5)")
    parser.add_argument("--no-layers", action="store_true", help="whole networks alone")
    parser.add_argument("--json", type=Path, help="where to keep all figures")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
