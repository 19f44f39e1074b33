"""Cases of benchmarks/kernels.py: a residual block's end (sum, ReLU, latents), GELU and 2 x 2 max pooling, both ways.

The reference is PyTorch in float64, since `kernels/reference.py` has no such functions. Of the backends those take part
whose `Abilities` name the operation.

Bytes are the least that the two ways need together: inputs read once, results written once, and what one keeps for the
other as small as it can be. A sum keeps its result, which the next block reads anyway. A pool keeps a byte for each
window. GELU keeps its input, which is there already; ours writes the derivative beside the result, so that its way
forward reaches two thirds of a copy's bandwidth at most.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from kernel_cases import Call, Case, Context, Maker, compiled
from torch import Tensor

__all__ = ["IMAGES", "TOKENS", "block_cases"]

IMAGES = ((64, 32, 4), (128, 16, 2), (256, 8, 2))  # channels, side, the latents' side: as ResNet18's stages have them
TOKENS = ((64, 512), (64, 1024))  # how many, and how wide an encoder's feed-forward net is inside


def block_cases(
    batch: int,
    context: Context,
    images: Sequence[tuple[int, int, int]] = IMAGES,
    tokens: Sequence[tuple[int, int]] = TOKENS,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Case]:
    """Sums and pools of each of `images`, GELU of each of `tokens`, all of one type."""
    for channels, side, latent_side in images:
        yield from _sum_act_cases((batch, channels, side, side), latent_side, context, dtype)
        yield from _max_pool_cases((batch, channels, side, side), context, dtype)
    for count, width in tokens:
        yield from _gelu_cases((batch, count, width), context, dtype)


@dataclass(frozen=True)
class _Operation:
    """An operation and its way back, in PyTorch and of a backend's module.

    Attributes:
        ability: of `Abilities`.
        inputs: their shapes.
        grad: shape of the gradient that comes back, that of the last result of `plain`.
        plain: inputs -> results. On the way back autograd follows the last of them to all inputs.
        forward: (module, inputs) -> the same results, and what is kept.
        backward: (module, gradient, what is kept) -> the gradients at all inputs.
        biased: `plain` takes a bias as well, whose gradient `backward` gives, too.
        comes_back: normal values of the case's type -> the gradient that comes back.
    """

    name: str
    ability: str
    inputs: tuple[tuple[int, ...], ...]
    grad: tuple[int, ...]
    plain: Callable[..., tuple[Tensor, ...]]
    forward: Callable[..., tuple[tuple[Tensor, ...], Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    comes_back: Callable[[Tensor], Tensor]
    biased: bool = False


def _sum_act_cases(shape: tuple[int, ...], side: int, context: Context, dtype: torch.dtype) -> Iterator[Case]:
    latents, values = (shape[0], shape[1] * side * side), torch.Size(shape).numel()
    size, of_latents = dtype.itemsize * values, 4 * torch.Size(latents).numel()  # float32, whatever the images are

    def plain(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(a + b)
        # Detached, as a local step hands it on: else a compiled way back would be given zeros as its gradient.
        return y.detach(), F.adaptive_avg_pool2d(y, side).flatten(1)

    def forward(module: ModuleType, a: Tensor, b: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        # Not in the place of `a`, as a step may have it: the next call is to read what this one read.
        result = module.sum_act_forward(a, b, side, 0.0)
        return result, result[0]

    def backward(module: ModuleType, grad: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        given = module.sum_act_backward(grad, y, side, 0.0)
        return given, given  # one tensor for both summands

    operation = _Operation("sum_act", "sums", (shape, shape), latents, plain, forward, backward, Tensor.float)
    moved, flops = (3 * size + of_latents, 2 * size + of_latents), (3 * values, 2 * values)
    yield from _both_ways(operation, f"{_words(shape)} to {side}x{side}", moved, flops, context, dtype)


def _max_pool_cases(shape: tuple[int, ...], context: Context, dtype: torch.dtype) -> Iterator[Case]:
    pooled = (*shape[:2], shape[2] // 2, shape[3] // 2)
    values, windows = torch.Size(shape).numel(), torch.Size(pooled).numel()
    moved = dtype.itemsize * (values + windows) + windows

    def plain(x: Tensor) -> tuple[Tensor, ...]:
        return (F.max_pool2d(x, 2),)

    def forward(module: ModuleType, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        y, places = module.max_pool_forward(x)
        return (y,), places

    def backward(module: ModuleType, grad: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        return (module.max_pool_backward(grad, places, *shape[2:]),)

    operation = _Operation("max_pool", "pools", (shape,), pooled, plain, forward, backward, _as_it_is)
    yield from _both_ways(operation, _words(shape), (moved, moved), (values, values), context, dtype)


def _gelu_cases(shape: tuple[int, ...], context: Context, dtype: torch.dtype) -> Iterator[Case]:
    values = torch.Size(shape).numel()
    size, sums = dtype.itemsize * values, dtype.itemsize * shape[-1]

    def plain(x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return (F.gelu(x if bias is None else x + bias),)

    def forward(module: ModuleType, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        y, slope = module.gelu_forward(x)  # not in the place of `x`, as above
        return (y,), slope

    def backward(module: ModuleType, grad: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
        given: tuple[Tensor, ...] = module.gelu_backward(grad, slope)
        return given

    def signs(grad: Tensor) -> Tensor:
        """What is kept is multiplied by it in its place, call after call, and must not vanish or overflow."""
        return torch.where(grad < 0, -1.0, 1.0).to(grad.dtype)

    operation = _Operation("gelu", "gelu", (shape,), shape, plain, forward, backward, signs, biased=True)
    moved, flops = (2 * size, 3 * size + sums), (30 * values, 30 * values)
    yield from _both_ways(operation, _words(shape), moved, flops, context, dtype)


def _both_ways(
    operation: _Operation,
    shape: str,
    moved: tuple[int, int],
    flops: tuple[int, int],
    context: Context,
    dtype: torch.dtype,
) -> Iterator[Case]:
    """Bytes and operations of the way forward and of the way back -> a case of each.

    Whatever the type, kernels calculate in float32, and that is the rate to compare with. Another type stands in a
    contender's name, since it has a tolerance of its own.
    """
    inputs = partial(_inputs, operation, dtype, context.device)
    word = "" if dtype == torch.float32 else " bf16"
    for what, plain, ours, its_bytes, its_flops in zip(
        ("forward", "backward"), (_plain_forward, _plain_backward), (_forward, _backward), moved, flops, strict=True
    ):
        makers: dict[str, Maker] = {"reference": partial(plain, operation, inputs, _as_it_is, torch.float64)}
        for name, module in context.backends.items():
            if getattr(module.ABILITIES, operation.ability):
                makers[name + word] = partial(ours, operation, inputs, module)
        makers["eager" + word] = partial(plain, operation, inputs, _as_it_is, dtype)
        if context.compiled:
            makers["compile" + word] = partial(plain, operation, inputs, compiled, dtype)
        yield Case(f"{operation.name}_{what}", shape + word, its_bytes, its_flops, makers)


_Inputs = Callable[[int], tuple[list[Tensor], Tensor]]


def _inputs(operation: _Operation, dtype: torch.dtype, device: torch.device, index: int) -> tuple[list[Tensor], Tensor]:
    """(inputs, the gradient that comes back) of one set of buffers, of the case's type."""
    generator = torch.Generator(device).manual_seed(index)
    *inputs, grad = (
        torch.randn(shape, generator=generator, device=device).to(
            dtype=dtype, memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format
        )
        for shape in (*operation.inputs, operation.grad)
    )
    return inputs, operation.comes_back(grad)


def _forward(operation: _Operation, inputs: _Inputs, module: ModuleType, index: int) -> Call:
    values, _ = inputs(index)
    return lambda: operation.forward(module, *values)[0]


def _backward(operation: _Operation, inputs: _Inputs, module: ModuleType, index: int) -> Call:
    values, grad = inputs(index)
    kept = operation.forward(module, *values)[1]  # so the way back shows, too, whether it is right
    return lambda: operation.backward(module, grad, kept)


def _plain_forward(
    operation: _Operation, inputs: _Inputs, wrap: Callable[..., Any], dtype: torch.dtype, index: int
) -> Call:
    values = [value.to(dtype) for value in inputs(index)[0]]
    function = wrap(operation.plain)

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = function(*values)
        return result

    return call


def _plain_backward(
    operation: _Operation, inputs: _Inputs, wrap: Callable[..., Any], dtype: torch.dtype, index: int
) -> Call:
    given, grad = inputs(index)
    values = [value.to(dtype).requires_grad_() for value in given]
    if operation.biased:  # of zeros: the product that gave the input has added it already
        values.append(torch.zeros(operation.grad[-1], dtype=dtype, device=grad.device, requires_grad=True))
    result = wrap(operation.plain)(*values)[-1]  # here, as in kernel_cases.py: on the stream of the capture
    grad = grad.to(dtype)
    return lambda: torch.autograd.grad(result, values, grad, retain_graph=True)


def _as_it_is(thing: Any) -> Any:
    return thing


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
