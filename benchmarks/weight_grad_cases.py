"""A case of benchmarks/kernels.py: from the latents' gradient to the convolution's, in two of kernels or in one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from kernel_cases import Call, Case, Context, LayerShape, Maker, layers_of, norm_inputs
from step_cases import CONVOLUTIONS
from torch import Tensor

from unlocked.kernels import reference

__all__ = ["weight_grad_cases"]


def weight_grad_cases(batch: int, context: Context, count: int = 3) -> Iterator[Case]:
    """Of SmallConv's first `count` layers. "in two": our way back through BatchNorm, then the library's weight
    gradient; "joined": `norm_act_weight_grad`. Both with the sums over the latents' windows before them."""
    layers = layers_of("SmallConv", batch)
    for (name, inputs, outputs, side), layer in list(zip(CONVOLUTIONS, layers, strict=False))[:count]:
        flops = 2 * batch * side * side * outputs * inputs * 9
        moved = 4 * (batch * side * side * (inputs + outputs) + 9 * inputs * outputs)
        makers: dict[str, Maker] = {"reference": partial(_make, _in_two, reference, "fp32", layer, inputs, context)}
        module = context.backends.get("triton")
        for precision in ("fp32", "tf32", "bf16") if module else ():
            makers[f"{precision} in two"] = partial(_make, _in_two, module, precision, layer, inputs, context)
            makers[f"{precision} joined"] = partial(_make, _joined, module, precision, layer, inputs, context)
        if "cuda" in context.backends:  # plain float32 is what it has
            cuda = context.backends["cuda"]
            makers["fp32 joined, CUDA C++"] = partial(_make, _joined, cuda, "fp32", layer, inputs, context)
        yield Case("norm_act_weight_grad", f"{name} {batch}x{inputs}x{side}x{side}", moved, flops, makers, "tf32")


_Way = Callable[..., tuple[Tensor, ...]]


def _make(
    way: _Way, module: ModuleType, precision: str, layer: LayerShape, inputs: int, context: Context, index: int
) -> Call:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch, outputs, side, _ = layer.shape
    generator = torch.Generator(context.device).manual_seed(index)
    x, kernel = (
        torch.randn(size, generator=generator, device=context.device).contiguous(memory_format=torch.channels_last)
        for size in ((batch, inputs, side, side), (outputs, inputs, 3, 3))
    )
    with _products("fp32"):
        conv = F.conv2d(x, kernel, padding=1).contiguous(memory_format=torch.channels_last)
    _, weight, bias, mean, var = norm_inputs(layer, context.device, index)
    forward = reference.norm_act_forward(conv, weight, bias, mean, var, latent_size=layer.latent_size)
    state = (forward.mean, forward.rstd, weight, bias, forward.mask_sums, forward.mask_xhat_sums)
    grad = 1e-3 * torch.randn((batch, layer.latents), generator=generator, device=context.device)
    x, kernel, conv, grad = (tensor.to(dtype) for tensor in (x, kernel, conv, grad))

    @torch.no_grad()
    def call() -> tuple[Tensor, ...]:
        with _products(precision):
            return way(module, (grad, conv, *state), x, kernel, layer.latent_size)

    return call


def _in_two(module: ModuleType, state: tuple[Tensor, ...], x: Tensor, kernel: Tensor, p: int) -> tuple[Tensor, ...]:
    conv_grad, *of_norm = module.norm_act_backward(*state, latent_size=p)
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(conv_grad, x, kernel, *options)[1], *of_norm


def _joined(module: ModuleType, state: tuple[Tensor, ...], x: Tensor, kernel: Tensor, p: int) -> tuple[Tensor, ...]:
    return tuple(module.norm_act_weight_grad(*state, x, kernel, padding=(1, 1), latent_size=p))


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """The library's convolutions, and so ours, in tf32 or not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
