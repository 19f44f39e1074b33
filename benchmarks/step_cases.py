"""More cases of benchmarks/kernels.py: the optimizer, the input, cuDNN's convolutions, and a whole local step."""

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import (
    CLASSES,
    Call,
    Case,
    Context,
    LayerShape,
    Maker,
    compiled,
    head_inputs,
    layers_of,
    norm_inputs,
    plain_head,
    plain_norm_act,
)
from torch import Tensor

from unlocked.kernels import reference

__all__ = ["CONVOLUTIONS", "convolution_cases", "load_cases", "optimizer_cases", "step_case"]

# SmallConv's convolutions: input channels, output channels, side.
CONVOLUTIONS = (("conv1", 3, 32, 32), ("conv2", 32, 64, 16), ("conv3", 64, 128, 8))
_WORDS = {"adam": 7, "adamw": 7, "sgd": 5}  # moved per parameter
_OPTIONS: dict[str, dict[str, Any]] = {"adam": {}, "adamw": {}, "sgd": {"momentum": 0.9}}
_LIBRARY = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_cases(name: str, shapes: list[tuple[int, ...]], context: Context) -> Iterator[Case]:
    """One step of Adam, AdamW and SGD with momentum over one layer's parameters."""
    values = sum(torch.Size(shape).numel() for shape in shapes)
    for kind, words in _WORDS.items():
        makers: dict[str, Maker] = {
            "reference": partial(_library_step, kind, shapes, context, False),
            "eager": partial(_library_step, kind, shapes, context, context.device.type == "cuda"),
        }
        if "triton" in context.backends:
            makers["triton"] = partial(_fused_step, kind, shapes, context)
        yield Case(f"optimizer {kind}", f"{name} {values}", 4 * words * values, 14 * values, makers)


def load_cases(batch: int, count: int, context: Context) -> Iterator[Case]:
    """A micro-batch of CIFAR-10's shape, as it is, and cropped and flipped."""
    values = batch * 3 * 32 * 32
    for name, options in (("plain", {}), ("crop flip", {"flip": True, "crop_padding": 4})):
        makers: dict[str, Maker] = {"reference": partial(_load, reference, batch, count, options, context)}
        for backend, module in context.backends.items():
            makers[backend] = partial(_load, module, batch, count, options, context)
        makers["eager"] = makers["reference"]
        yield Case(f"load_batch {name}", f"{batch}x3x32x32", 5 * values + 24 * batch, 60 * values, makers)


def convolution_cases(batch: int, context: Context) -> Iterator[Case]:
    """The library's part: forward and weight gradient of each of SmallConv's convolutions, and of the first one with a
    fourth channel of zeros."""
    for name, inputs, outputs, side in (*CONVOLUTIONS, ("conv1 of four", 4, 32, 32)):
        flops = 2 * batch * side * side * outputs * inputs * 9
        moved = 4 * (batch * side * side * (inputs + outputs) + 9 * inputs * outputs)
        for what in ("forward", "weight gradient"):
            shapes = (batch, inputs, outputs, side)
            makers: dict[str, Maker] = {"reference": partial(_convolve, what, shapes, "fp32", False, context)}
            for precision in ("fp32", "tf32", "bf16"):
                for last in (True, False):
                    label = f"{precision} {'channels-last' if last else 'contiguous'}"
                    makers[label] = partial(_convolve, what, shapes, precision, last, context)
            yield Case(f"convolution {what}", f"{name} {batch}x{inputs}x{side}x{side}", moved, flops, makers, "tf32")


def step_case(batch: int, context: Context, count: int = 3) -> Case:
    """SmallConv's local step, layers 1 to 3, everything but the convolutions: one number per contender."""
    layers = layers_of("SmallConv", batch)[:count]
    makers: dict[str, Maker] = {"reference": partial(_plain_step, layers, context, "reference")}
    for name, module in context.backends.items():
        makers[name] = partial(_own_step, layers, context, module)
    makers["eager"] = partial(_plain_step, layers, context, "eager")
    if context.compiled:
        makers["compile"] = partial(_plain_step, layers, context, "compile")
    size = sum(4 * torch.Size(layer.shape).numel() for layer in layers)
    return Case("SmallConv local step", f"layers 1 to {count}, batch {batch}", 4 * size, 5 * size, makers)


def _library_step(kind: str, shapes: list[tuple[int, ...]], context: Context, fused: bool, index: int) -> Call:
    parameters, grads = _parameters(shapes, context.device, index)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    options = dict(_OPTIONS[kind])
    if fused:
        options["fused"] = True
        if kind != "sgd":
            options["capturable"] = True
    optimizer = _LIBRARY[kind](parameters, lr=1e-2, **options)

    def call() -> tuple[Tensor, ...]:
        optimizer.step()
        return tuple(parameters)

    return call


def _fused_step(kind: str, shapes: list[tuple[int, ...]], context: Context, index: int) -> Call:
    from unlocked.kernels.triton.optim import FusedOptimizer

    parameters, grads = _parameters(shapes, context.device, index)
    optimizer = FusedOptimizer(parameters, kind, lr=1e-2, **_OPTIONS[kind])

    def call() -> tuple[Tensor, ...]:
        optimizer.step(grads)
        return tuple(parameters)

    return call


def _parameters(
    shapes: list[tuple[int, ...]], device: torch.device, index: int
) -> tuple[list[torch.nn.Parameter], list[Tensor]]:
    generator = torch.Generator(device).manual_seed(index)
    values = [torch.randn(s, generator=generator, device=device) for s in shapes]
    grads = [torch.randn(s, generator=generator, device=device) for s in shapes]
    return [torch.nn.Parameter(v) for v in values], grads


def _load(module: ModuleType, batch: int, count: int, options: dict[str, Any], context: Context, index: int) -> Call:
    device = context.device
    generator = torch.Generator(device).manual_seed(index)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator, device=device)
    labels = torch.randint(0, CLASSES, (count,), generator=generator, device=device)
    order = torch.randperm(count, generator=generator, device=device)
    start, epoch = (torch.tensor(value, device=device) for value in (count - batch, 3))
    mean, inv_std = torch.tensor([120.0, 121.0, 122.0], device=device), torch.tensor([0.016] * 3, device=device)

    def call() -> tuple[Tensor, ...]:
        values, targets = module.load_batch(
            images, labels, order, start, batch, mean=mean, inv_std=inv_std, seed=7, epoch=epoch, **options
        )
        return values, targets

    return call


def _convolve(
    what: str, shapes: tuple[int, int, int, int], precision: str, last: bool, context: Context, index: int
) -> Call:
    batch, inputs, outputs, side = shapes
    generator = torch.Generator(context.device).manual_seed(index)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    sizes = ((batch, inputs, side, side), (outputs, inputs, 3, 3), (batch, outputs, side, side))
    x, weight, grad = (
        torch.randn(size, generator=generator, device=context.device).to(dtype=dtype, memory_format=layout)
        for size in sizes
    )

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        if what == "forward":
            return (F.conv2d(x, weight, padding=1),)
        mask = [False, True, False]
        return (
            torch.ops.aten.convolution_backward(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)[
                1
            ],
        )

    return call


def _own_step(layers: list[LayerShape], context: Context, module: ModuleType, index: int) -> Call:
    from unlocked.kernels.triton.optim import FusedOptimizer

    states = [_layer_state(k, layer, context, index) for k, layer in enumerate(layers)]
    optimizers = [FusedOptimizer(parameters, "adam", lr=1e-2) for parameters, *_ in states]
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for layer, (parameters, kernel_grad, norm, head), optimizer in zip(layers, states, optimizers, strict=True):
            conv, _, _, mean, var = norm
            _, weight, bias = parameters
            result = module.norm_act_forward(
                conv, weight, bias, mean, var, latent_size=layer.latent_size, pool=layer.pool, pool_size=layer.pool_size
            )
            found = module.local_head(result.latents, head[1], head[2], temperature=0.5, totals=totals)
            _, *grads = module.norm_act_backward(
                found.latents_grad, conv, result.mean, result.rstd, weight, bias, result.mask_sums,
                result.mask_xhat_sums, latent_size=layer.latent_size,
            )  # fmt: skip
            optimizer.step([kernel_grad, *grads])
            made += [result.output, *grads]
        return tuple(made)

    return call


def _plain_step(layers: list[LayerShape], context: Context, how: str, index: int) -> Call:
    """As `_own_step`, with torch.nn's functions, autograd and torch.optim's fused Adam."""
    states = [_layer_state(k, layer, context, index) for k, layer in enumerate(layers)]
    fused: dict[str, Any] = (
        {"fused": True, "capturable": True} if how != "reference" and context.device.type == "cuda" else {}
    )
    optimizers = [torch.optim.Adam(parameters, lr=1e-2, **fused) for parameters, *_ in states]
    totals = torch.zeros(2, dtype=torch.float64, device=context.device)
    functions: list[Callable[..., Any]] = [partial(_plain_layer, layer) for layer in layers]
    if how == "compile":
        functions = [compiled(function) for function in functions]

    def call() -> tuple[Tensor, ...]:
        made: list[Tensor] = []
        for function, (parameters, kernel_grad, norm, head), optimizer in zip(
            functions, states, optimizers, strict=True
        ):
            conv, _, _, mean, var = norm
            kernel, weight, bias = parameters
            loss, correct, output = function(conv.requires_grad_(), weight, bias, mean, var, head[1], head[2])
            _, weight.grad, bias.grad = torch.autograd.grad(loss, (conv, weight, bias))
            kernel.grad = kernel_grad
            optimizer.step()
            with torch.no_grad():
                totals[0] += loss.detach() * conv.shape[0]
                totals[1] += correct
            assert weight.grad is not None
            assert bias.grad is not None
            made += [output, weight.grad, bias.grad]
        return tuple(made)

    return call


def _plain_layer(
    layer: LayerShape,
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    labels: Tensor,
    basis: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, correct rows, what the next layer reads)."""
    output, latents = plain_norm_act(layer, conv, weight, bias, mean, var)
    return *plain_head(latents, labels, basis), output.detach()


def _layer_state(
    number: int, layer: LayerShape, context: Context, index: int
) -> tuple[list[torch.nn.Parameter], Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(kernel, weight and bias; the kernel's gradient; the inputs of norm_act; those of the head)."""
    _, inputs, outputs, _ = CONVOLUTIONS[number]
    norm = norm_inputs(layer, context.device, 10 * index + number)
    (kernel,), (kernel_grad,) = _parameters([(outputs, inputs, 3, 3)], context.device, index)
    parameters = [kernel, *(torch.nn.Parameter(t) for t in norm[1:3])]
    return parameters, kernel_grad, norm, head_inputs("LLS", layer, context.device, 10 * index + number)
