"""How long single Triton launches of the local step take, by their geometry: what other constants would bring.

    python benchmarks/launches.py --json launches.json               # on a GPU; half a minute once all is compiled
    python benchmarks/launches.py --compile-only --part 3 --of 10    # a tenth of the compilation, to share it out
    python benchmarks/launches.py --device cpu --compile-only --kernel wgrad --layer conv1   # with TRITON_INTERPRET=1

SmallConv's convolutional layers, channels last. A time is the median of replays of a graph of launches on three sets of
tensors, which lie in the L2 cache, as a step's do. The row of the geometry that is in use says "in use".
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import capture, measure_in_turns
from torch import Tensor

from unlocked.comparison.environment import environment
from unlocked.kernels.reference import PoolKind
from unlocked.kernels.triton import norm_act_geometry, weight_grad_geometry
from unlocked.kernels.triton.norm_act import Launch, backward_launches, forward_launches, run_launches, shape_of
from unlocked.kernels.triton.weight_grad import weight_grad_launches
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

__all__ = ["Variant", "main", "variants"]

LAYERS = {"conv1": (3, 32, 32, 4), "conv2": (32, 64, 16, 2), "conv3": (64, 128, 8, 2)}
"""Input channels, output channels, side, side of the latents."""
_SETS, _REPLAYS = 3, 9
_MODULES = (norm_act_geometry, weight_grad_geometry)
_CACHED = (
    norm_act_geometry.forward_geometry,
    norm_act_geometry.backward_geometry,
    weight_grad_geometry.weight_grad_geometry,
)


@dataclass(frozen=True)
class Variant:
    """One launch of an operation, with other constants of the geometry."""

    kernel: str
    make: "Callable[[str, int, torch.device], tuple[list[Launch], Tensor]]"
    index: int
    """Of the operation's launches."""
    constants: dict[str, int] = field(default_factory=dict)
    warps: int | None = None
    """None: as the geometry says."""

    @property
    def name(self) -> str:
        told = [f"{name} {value}" for name, value in self.constants.items()]
        return ", ".join([*told, *([f"{self.warps} warps"] if self.warps else [])]) or "in use"


def variants() -> Iterator[Variant]:
    """The geometry in use, and others."""
    for tile, warps in itertools.product((1024, 2048, 4096), (2, 4, 8)):
        yield Variant("pass", forward, 1, {"TILE": tile}, warps)
        yield Variant("back pass", backward, 1, {"TILE": tile}, warps)
    for partials, programs, warps in itertools.product((32, 64, 128), (256, 512), (4, 8)):
        yield Variant("moments", forward, 0, {"PARTIALS_SMALL": partials, "REDUCING_PROGRAMS": programs}, warps)
    for steps, size, warps in itertools.product((16, 8, 4, 2), (128, 256), (4, 8)):
        yield Variant(
            "wgrad", joined, 1, {"STEPS_OF_A_WAVE": steps, "STEP_BYTES": size, "SMALL_STEP_BYTES": size}, warps
        )
    for kernel, make, index in (
        *(("moments", forward, 0), ("pass", forward, 1), ("window totals", joined, 0), ("back pass", backward, 1)),
        *(("wgrad", joined, 1), ("wgrad sum", joined, 2)),
    ):
        yield Variant(kernel, make, index)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--layer", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--kernel", nargs="*", help="only these, such as pass or wgrad")
    parser.add_argument("--compile-only", action="store_true", help="run each once")
    parser.add_argument("--part", type=int, default=0, help="of --of parts")
    parser.add_argument("--of", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("launches: needs a CUDA device; none is there (--device cpu --compile-only runs)", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    chosen = [v for v in variants() if not options.kernel or v.kernel in options.kernel]
    rows: list[dict[str, Any]] = []
    for number, (layer, variant) in enumerate(itertools.product(options.layer, chosen)):
        if number % options.of != options.part:
            continue
        row: dict[str, Any] = {"layer": layer, "kernel": variant.kernel, "variant": variant.name}
        try:
            row |= one(layer, variant, options.batch, device, timed=not options.compile_only)
        except Exception as error:  # one that does not compile is a result; the others still report
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
        rows.append(row)
        print(f"{layer} {variant.kernel:<14} {variant.name:<44} {row.get('us', row.get('error', 'ran'))}", flush=True)
    if options.json:
        write_json(options.json, {"environment": to_plain(environment()), "batch": options.batch, "rows": rows})
    return 1 if any("error" in row for row in rows) else 0


def one(layer: str, variant: Variant, batch: int, device: torch.device, *, timed: bool) -> dict[str, Any]:
    """Microseconds, and the grid."""
    with _constants(variant.constants):
        made = [variant.make(layer, batch, device) for _ in range(_SETS if timed else 1)]
    launches = [operation[variant.index] for operation, _ in made]
    if variant.warps:
        launches = [launch._replace(num_warps=variant.warps) for launch in launches]
    calls = [
        lambda launch=launch, like=like: run_launches(like, [launch])
        for launch, (_, like) in zip(launches, made, strict=True)
    ]
    if not timed:
        calls[0]()
        return {}
    stream = torch.cuda.Stream(device)
    captured = capture(variant.name, calls * 8, stream)
    (sample,) = measure_in_turns([captured], stream, _REPLAYS).values()
    return {"us": round(sample.median, 2), "grid": list(launches[0].grid), "warps": launches[0].num_warps}


def forward(layer: str, batch: int, device: torch.device) -> tuple[list[Launch], Tensor]:
    _, _, conv, vectors, _, _, side = _tensors(layer, batch, device)
    pool: PoolKind = "average" if layer == "conv3" else "max"  # what SmallConv's layers end in
    return forward_launches(conv, *vectors, None, side, pool, side, 0.1, 1e-5, 0.01, None)[1], conv


def backward(layer: str, batch: int, device: torch.device) -> tuple[list[Launch], Tensor]:
    _, _, conv, (weight, bias, mean, rstd), sums, grad, side = _tensors(layer, batch, device)
    return backward_launches(grad, conv, mean, rstd, weight, bias, sums, side, 0.01)[1], conv


def joined(layer: str, batch: int, device: torch.device) -> tuple[list[Launch], Tensor]:
    x, kernel, conv, (weight, bias, mean, rstd), sums, grad, side = _tensors(layer, batch, device)
    tf32 = device.type == "cuda"
    height, width = x.shape[2:]
    source = weight_grad_geometry.Convolution((x.shape[1], height, width), (3, 3), (1, 1), (1, 1), (1, 1))
    geometry = weight_grad_geometry.weight_grad_geometry(shape_of(conv), side, source, tf32=tf32)
    return weight_grad_launches(
        grad, conv, mean, rstd, weight, bias, *sums, x, kernel, geometry, 0.01, tf32=tf32
    )[1], conv  # fmt: skip


def _tensors(layer: str, batch: int, device: torch.device) -> tuple[Any, ...]:
    inputs, channels, size, side = LAYERS[layer]
    x, kernel = (
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        for shape in ((batch, inputs, size, size), (channels, inputs, 3, 3))
    )
    conv = F.conv2d(x, kernel, padding=1).contiguous(memory_format=torch.channels_last)
    vectors = [torch.rand(channels, device=device) + 0.5 for _ in range(4)]
    latents = batch, channels * side * side
    sums = (torch.rand(latents, device=device), torch.rand(latents, device=device))
    return x, kernel, conv, vectors, sums, 1e-3 * torch.randn(latents, device=device), side


@contextmanager
def _constants(chosen: dict[str, int]) -> Iterator[None]:
    """The geometry's modules with other constants, and nothing of it remembered."""
    before = [(module, name, getattr(module, name)) for module in _MODULES for name in chosen if hasattr(module, name)]
    try:
        for module, name, _ in before:
            setattr(module, name, chosen[name])
        for cached in _CACHED:
            cached.cache_clear()
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        for cached in _CACHED:
            cached.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
