# mypy: allow-untyped-defs, allow-incomplete-defs
"""The sum at a residual block's end with its activation and latents, and back, in Triton: one launch each way.

Results repeat bit by bit: a window's values are added up by one program, in an order that the shape alone decides.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.triton.norm_act import (
    Launch,
    check_inputs,
    check_window_tensors,
    latent_side,
    run_launches,
    shape_of,
)
from unlocked.kernels.triton.norm_act_forward_kernels import window_origin
from unlocked.kernels.triton.norm_act_geometry import (
    REDUCING_PROGRAMS,
    SECTOR,
    TILE,
    Shape,
    divide_up,
    power_of_2,
)

__all__ = [
    "sum_act_backward",
    "sum_act_backward_launch",
    "sum_act_forward",
    "sum_act_forward_launch",
]


def sum_act_forward(
    a: Tensor, b: Tensor, latent_size: int, negative_slope: float, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(f(a + b) with f a leaky ReLU, its averages over p x p windows [B, C p p] float32).

    Args:
        a: [B, C, H, W], float32, bfloat16 or float16, in channels-last memory.
        b: like it.
        latent_size: p, which divides H and W.
        negative_slope: of f, at least 0; 1: f(x) = x.
        in_place: the result takes the place of `a`.

    Raises:
        ValueError: a dtype, shape, layout or device that does not fit; windows that do not tile the plane;
            B x H x W >= 2**30.
    """
    _check_images(latent_size, a=a, b=b)
    result, launch = sum_act_forward_launch(a, b, latent_size, negative_slope, in_place=in_place)
    run_launches(a, [launch])
    return result


def sum_act_backward(grad: Tensor, y: Tensor, latent_size: int, negative_slope: float) -> Tensor:
    """The gradient at a, which is that at b as well, like `y`, what `sum_act_forward` gave; zero counts as below it.

    Args:
        grad: at the latents, [B, C p p] float32.

    Raises:
        ValueError: as `sum_act_forward`.
    """
    _check_images(latent_size, y=y)
    check_window_tensors(y, latent_size, {"grad": grad})
    result, launch = sum_act_backward_launch(grad.contiguous(), y, latent_size, negative_slope)
    run_launches(y, [launch])
    return result


def sum_act_forward_launch(
    a: Tensor, b: Tensor, side: int, negative_slope: float, *, in_place: bool = False
) -> tuple[tuple[Tensor, Tensor], Launch]:
    """What `sum_act_forward` gives, in buffers that are still to be filled, and the launch that fills them."""
    shape = shape_of(a)
    out = a if in_place else torch.empty_like(a)
    latents = a.new_empty((shape.batch, shape.channels * side * side), dtype=torch.float32)
    grid, num_windows, constants = _geometry(shape, side)
    arguments = (a, b, out, latents, num_windows, shape.channels, float(negative_slope))
    constants = {**constants, "RELU": negative_slope == 0}
    return (out, latents), Launch(sum_act_forward_kernel, grid, 4, arguments, constants)


def sum_act_backward_launch(grad: Tensor, y: Tensor, side: int, negative_slope: float) -> tuple[Tensor, Launch]:
    """What `sum_act_backward` gives and the launch that fills it."""
    shape = shape_of(y)
    out = torch.empty_like(y)
    grid, num_windows, constants = _geometry(shape, side)
    arguments = (grad, y, out, num_windows, shape.channels, float(negative_slope))
    return out, Launch(sum_act_backward_kernel, grid, 4, arguments, constants)


@triton.jit
def sum_act_forward_kernel(
    a, b, out, latents, num_windows, channels, negative_slope,
    H: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Images [B, H, W, C] in memory, latents [B, C, SIDE, SIDE]. A program has BLOCK_Q windows of BLOCK_C channels."""
    WIN_H: tl.constexpr = H // SIDE
    WIN_W: tl.constexpr = W // SIDE
    window, channel, stored = _windows(num_windows, channels, BLOCK_Q, BLOCK_C)
    origin = window_origin(window, H * W * channels, W * channels, channels, SIDE, SIDE, WIN_H, WIN_W)
    first = (origin[:, None] + channel[None, :])[:, None, :]
    total = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_C], tl.float32)
    for start in range(0, WIN_H * WIN_W, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        place = first + ((pixel // WIN_W * W + pixel % WIN_W) * channels)[None, :, None]
        valid = stored[:, None, :] & (pixel < WIN_H * WIN_W)[None, :, None]
        x = tl.load(a + place, mask=valid, other=0.0).to(tl.float32)
        x += tl.load(b + place, mask=valid, other=0.0).to(tl.float32)
        below = 0.0 if RELU else x * negative_slope  # a ReLU of minus infinity is zero
        value = tl.where(x <= 0.0, below, x)  # what is not a number stays so
        tl.store(out + place, value.to(out.dtype.element_ty), mask=valid)
        total += value
    place = _latent_places(window, channel, channels, SIDE * SIDE)
    tl.store(latents + place, tl.sum(total, 1) * (1.0 / (WIN_H * WIN_W)), mask=stored)


@triton.jit
def sum_act_backward_kernel(
    grad, y, out, num_windows, channels, negative_slope,
    H: tl.constexpr, W: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every pixel's part of its window's gradient, as `sum_act_forward_kernel` has the windows."""
    WIN_H: tl.constexpr = H // SIDE
    WIN_W: tl.constexpr = W // SIDE
    window, channel, stored = _windows(num_windows, channels, BLOCK_Q, BLOCK_C)
    given = tl.load(grad + _latent_places(window, channel, channels, SIDE * SIDE), mask=stored, other=0.0)
    above = (given * (1.0 / (WIN_H * WIN_W)))[:, None, :]
    below = above * negative_slope
    origin = window_origin(window, H * W * channels, W * channels, channels, SIDE, SIDE, WIN_H, WIN_W)
    first = (origin[:, None] + channel[None, :])[:, None, :]
    for start in range(0, WIN_H * WIN_W, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        place = first + ((pixel // WIN_W * W + pixel % WIN_W) * channels)[None, :, None]
        valid = stored[:, None, :] & (pixel < WIN_H * WIN_W)[None, :, None]
        activation = tl.load(y + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + place, tl.where(activation <= 0.0, below, above).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _windows(num_windows, channels, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of this program: windows [BLOCK_Q], channels [BLOCK_C], and which of both there are [BLOCK_Q, BLOCK_C]."""
    window = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return window, channel, (window < num_windows)[:, None] & (channel < channels)[None, :]


@triton.jit
def _latent_places(window, channel, channels, CELLS: tl.constexpr):
    """Offsets [windows, channels] in [B, C, CELLS], in 64 bits."""
    image = (window // CELLS).to(tl.int64)
    return (image[:, None] * channels + channel[None, :]) * CELLS + (window % CELLS)[:, None]


def _check_images(latent_size: int, **images: Tensor) -> None:
    """Raises a ValueError unless all are alike, and the kernels take them and windows of this size."""
    first = next(iter(images.values()))
    check_inputs(first, {})
    for name, image in images.items():
        alike = (image.shape, image.dtype, image.device) == (first.shape, first.dtype, first.device)
        if not alike or image.dim() != 4 or not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name} must be [B, C, H, W] in channels-last memory, {first.dtype} on {first.device}, got "
                f"{tuple(image.shape)} {image.dtype} on {image.device} with strides {image.stride()}"
            )
    if latent_side(first, latent_size) == 0:
        raise ValueError("latent_size 0 has no latents; valid: a divisor of height and width")


@lru_cache(maxsize=1024)
def _geometry(shape: Shape, side: int) -> tuple[tuple[int, int], int, Mapping[str, int]]:
    """(grid, windows of the batch, sizes that a kernel is compiled for)."""
    num_windows, pixels = shape.batch * side * side, (shape.height // side) * (shape.width // side)
    block_c = min(32, power_of_2(shape.channels))
    if num_windows * divide_up(shape.channels, block_c) < REDUCING_PROGRAMS:
        block_c = min(block_c, SECTOR // shape.itemsize)  # few windows: more programs, if of narrower reads
    block_k = min(power_of_2(pixels), TILE // block_c)
    block_q = min(power_of_2(num_windows), TILE // (block_c * block_k))
    sizes = {"H": shape.height, "W": shape.width, "SIDE": side}
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_C": block_c}
    return (divide_up(num_windows, block_q), divide_up(shape.channels, block_c)), num_windows, sizes | blocks
