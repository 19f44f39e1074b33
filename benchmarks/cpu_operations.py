"""The local step on a CPU, taken apart: what each kept improvement brings, and where a step's time goes now.

Used by benchmarks/cpu_step.py; both run in one process, whose intra-op threads the caller sets.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median
from types import ModuleType
from typing import Any

import torch
from plain_lls import PlainLLS
from torch import Tensor, nn

from unlocked.kernels import cpp
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime.network import Network, build_layer, build_network
from unlocked.workers.fused import choose_step
from unlocked.workers.graph import operations as table
from unlocked.workers.layer import Layer

__all__ = ["ceilings", "ladder", "operations"]

BATCH = 64
CPU = torch.device("cpu")


def ladder(rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds per step of the plain implementation and of each improvement on top of the one before; one median per
    round, and in a round all take turns."""
    plain = PlainLLS()
    variants: dict[str, Callable[[Tensor, Tensor], object]] = {
        "plain autograd": plain.step,
        "+ channels last, fused Adam": partial(run_layers, build_layers("torch")),
        "+ closed form": partial(without_in_place, build_layers("cpp", native_optimizer=False)),
        "+ gradients in place": partial(run_layers, build_layers("cpp", native_optimizer=False)),
        "+ optimizer in one call": partial(run_layers, build_layers("cpp")),
    }
    images, labels = batch()
    contiguous = images.contiguous()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for step in variants.values():
        for _ in range(3):
            step(images, labels)
    for _ in range(rounds):
        for name, step in variants.items():
            x = contiguous if name == "plain autograd" else images
            times[name].append(median(seconds(partial(step, x, labels)) for _ in range(steps)))
    return times


def operations(steps: int) -> list[dict[str, Any]]:
    """A row per layer and operation of the closed form: median seconds, bytes that it must move and floating-point
    operations that it must do."""
    layers = build_layers("cpp")
    images, labels = batch()
    for _ in range(3):
        run_layers(layers, images, labels)
    rows = []
    for (name, operation), values in recorded(layers, images, labels, steps).items():
        block = next(layer.block for layer in layers if layer.name == name)
        moved, flops = cost(operation, block, layers)
        rows.append(
            {"layer": name, "operation": operation, "seconds": median(values), "bytes": moved, "operations": flops}
        )
    return rows


def ceilings() -> tuple[float, float]:
    """What this machine reaches: operations per second of a matrix product, bytes per second of a copy."""
    a = torch.randn(1536, 1536)
    b = torch.randn(16 << 20)
    target = torch.empty_like(b)
    product = min(seconds(lambda: a @ a) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(b)) for _ in range(10))
    return 2 * 1536**3 / product, 2 * b.numel() * 4 / copy


def build_layers(kernels: str, *, native_optimizer: bool = True) -> list[Layer]:
    """SmallConv's layers with LLS and Adam."""
    layers = []
    network = make_network()
    for index in range(len(network.blocks)):
        layer = build_layer(
            network,
            index,
            rule=get_rule("LLS", temperature=0.5, label_smoothing=0.0, waveform="cosine"),
            optimizer=partial(torch.optim.Adam, lr=0.01, fused=True),
            device=CPU,
            step=choose_step(kernels, CPU),
        )
        if not native_optimizer:
            layer.optimizer = layer.optimizer.wrapped
        layers.append(layer)
    return layers


def make_network() -> Network:
    model = get_model("SmallConv", in_channels=3, num_classes=10, image_size=32, dropout=0.0)
    return build_network(model, input_shape=(3, 32, 32), num_classes=10, seed=0)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (BATCH,), generator=generator)


def run_layers(layers: list[Layer], images: Tensor, labels: Tensor) -> None:
    x = images
    for layer in layers:
        x = layer.forward(x)
        layer.update(labels)


def recorded(layers: list[Layer], images: Tensor, labels: Tensor, steps: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of every operation of these steps, by layer and operation."""
    with recording(layers) as (times, current):
        for _ in range(steps):
            x = images
            for layer in layers:
                current.append(layer.name)
                x = layer.forward(x)
                layer.update(labels)
    return times


def without_in_place(layers: list[Layer], images: Tensor, labels: Tensor) -> None:
    """With a fresh buffer for every gradient, as before."""
    kept, cpp.ABILITIES = cpp.ABILITIES, replace(cpp.ABILITIES, in_place=False)
    try:
        run_layers(layers, images, labels)
    finally:
        cpp.ABILITIES = kept


@contextlib.contextmanager
def recording(layers: list[Layer]) -> Iterator[tuple[dict[tuple[str, str], list[float]], list[str]]]:
    """Times every operation of a step; the second value's last entry says whose they are."""
    times: dict[tuple[str, str], list[float]] = {}
    current: list[str] = []
    undo: list[Callable[[], None]] = []

    def wrap(owner: Any, attribute: str, name: str) -> None:
        original = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = original(*arguments, **options)
            times.setdefault((current[-1], name), []).append(time.perf_counter() - began)
            return result

        setattr(owner, attribute, timed)
        undo.append(partial(setattr, owner, attribute, original))

    backend: ModuleType = cpp
    wrap(torch.nn.functional, "conv2d", "convolution")
    wrap(table, "convolution_backward", "weight gradient")
    wrap(backend, "norm_act_forward", "normalise, activate, pool")
    wrap(backend, "local_head", "head")
    wrap(backend, "norm_act_backward", "normalisation backward")
    for layer in layers:
        wrap(layer.optimizer, "step", "optimizer")
    try:
        yield times, current
    finally:
        for restore in undo:
            restore()


def cost(operation: str, block: nn.Module, layers: list[Layer]) -> tuple[int, int]:
    """Bytes and floating-point operations that `operation` can't do without, for one micro-batch."""
    parameters = sum(p.numel() for p in block.parameters())
    if operation == "optimizer":
        return 4 * 7 * parameters, 12 * parameters  # reads p, g, m, v; writes p, m, v
    conv = getattr(block, "conv", None)
    if conv is None:
        return 0, 0
    index = [layer.block for layer in layers].index(block)  # type: ignore[arg-type]
    side = (32, 16, 8)[index]
    pixels = BATCH * side * side
    inside, outside = pixels * conv.in_channels, pixels * conv.out_channels
    pooled = outside // (4 if index < 2 else 16)
    return {
        "convolution": (4 * (inside + outside), 2 * 9 * conv.in_channels * outside),
        "weight gradient": (4 * (inside + outside), 2 * 9 * conv.in_channels * outside),
        "normalise, activate, pool": (4 * (2 * outside + pooled), 14 * outside),
        "normalisation backward": (4 * 2 * outside, 10 * outside),
    }.get(operation, (0, 0))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
