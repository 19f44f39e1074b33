# mypy: allow-untyped-defs, allow-incomplete-defs
"""2 x 2 max pooling at stride 2 in Triton, and back from where each window's largest lies: one launch each way.

A last odd row or column belongs to no window. Of equals the first counts, and a NaN is larger than all, as the library
has it.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.triton.norm_act import Launch, check_inputs, run_launches
from unlocked.kernels.triton.norm_act_forward_kernels import window_origin
from unlocked.kernels.triton.norm_act_geometry import divide_up, power_of_2

__all__ = [
    "max_pool_backward",
    "max_pool_backward_launch",
    "max_pool_forward",
    "max_pool_forward_launch",
]

_TILE = 512  # windows, times channels, of a program: sixteen values to a thread
_CHANNELS = 64  # of a program at most


def max_pool_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest of every window [B, C, H // 2, W // 2], where it lies in it: 0 to 3, uint8, like the first).

    Args:
        x: [B, C, H, W], float32, bfloat16 or float16, in channels-last memory; H and W at least 2.

    Raises:
        ValueError: a dtype, shape or layout that does not fit; B x H x W >= 2**30.
    """
    check_inputs(x, {})
    if x.dim() != 4 or min(x.shape[2:]) < 2 or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            "x must be [B, C, H, W] of 2 x 2 pixels or more, in channels-last memory, got "
            f"{tuple(x.shape)} with strides {x.stride()}"
        )
    result, launch = max_pool_forward_launch(x)
    run_launches(x, [launch])
    return result


def max_pool_backward(grad: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """The gradient at the input [B, C, height, width], from that at the result.

    Args:
        grad: [B, C, height // 2, width // 2].
        places: as `max_pool_forward` gave them.

    Raises:
        ValueError: as `max_pool_forward`; places that are not those of such an input.
    """
    check_inputs(grad, {})
    wanted = (*grad.shape[:2], height // 2, width // 2)
    lies = places.is_contiguous(memory_format=torch.channels_last) if places.dim() == 4 else False
    if not lies or grad.shape != wanted or places.shape != wanted or places.device != grad.device:
        raise ValueError(
            f"grad and places must be {wanted} on one device, places in channels-last memory, got {tuple(grad.shape)} "
            f"on {grad.device} and {tuple(places.shape)} on {places.device} with strides {places.stride()}"
        )
    grad = grad.contiguous(memory_format=torch.channels_last)
    result, launch = max_pool_backward_launch(grad, places, height, width)
    run_launches(grad, [launch])
    return result


def max_pool_forward_launch(x: Tensor) -> tuple[tuple[Tensor, Tensor], Launch]:
    """What `max_pool_forward` gives, in buffers that are still to be filled, and the launch that fills them."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    places = torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    num_windows = batch * shape[2] * shape[3]
    grid, constants = _geometry(num_windows, channels, height, width)
    return (y, places), Launch(max_pool_forward_kernel, grid, 4, (x, y, places, num_windows, channels), constants)


def max_pool_backward_launch(grad: Tensor, places: Tensor, height: int, width: int) -> tuple[Tensor, Launch]:
    """What `max_pool_backward` gives and the launch that fills it."""
    batch, channels = grad.shape[:2]
    shape = (batch, channels, height, width)
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    num_windows = batch * divide_up(height, 2) * divide_up(width, 2)
    grid, constants = _geometry(num_windows, channels, height, width)
    return out, Launch(max_pool_backward_kernel, grid, 4, (grad, places, out, num_windows, channels), constants)


@triton.jit
def max_pool_forward_kernel(
    x, y, places, num_windows, channels, H: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Images [B, H, W, C] in memory; y, places [B, H // 2, W // 2, C]."""
    window = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (window < num_windows)[:, None] & (channel < channels)[None, :]
    origin = window_origin(window, H * W * channels, W * channels, channels, H // 2, W // 2, 2, 2)
    first = x + (origin[:, None] + channel[None, :])
    most = tl.load(first, mask=valid, other=0.0).to(tl.float32)
    place = tl.zeros([BLOCK_Q, BLOCK_C], tl.int32)
    for corner in tl.static_range(1, 4):
        step = (corner // 2 * W + corner % 2) * channels
        value = tl.load(first + step, mask=valid, other=0.0).to(tl.float32)
        larger = (value > most) | (value != value)
        most = tl.where(larger, value, most)
        place = tl.where(larger, corner, place)
    to = window.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y + to, most.to(y.dtype.element_ty), mask=valid)
    tl.store(places + to, place.to(tl.uint8), mask=valid)


@triton.jit
def max_pool_backward_kernel(
    grad, places, out, num_windows, channels,
    H: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Every pixel of `out` [B, H, W, C] is written: windows here are those of the forward pass and, at odd sizes, those
    that a last row or column begins, whose gradient is zero."""
    DOWN: tl.constexpr = (H + 1) // 2
    ACROSS: tl.constexpr = (W + 1) // 2
    window = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = (window < num_windows)[:, None] & (channel < channels)[None, :]
    image = (window // (DOWN * ACROSS)).to(tl.int64)
    i = window // ACROSS % DOWN
    j = window % ACROSS
    source = (image * (H // 2 * (W // 2)) + i * (W // 2) + j)[:, None] * channels + channel[None, :]
    whole = valid & (i < H // 2)[:, None] & (j < W // 2)[:, None]
    value = tl.load(grad + source, mask=whole, other=0.0)
    place = tl.load(places + source, mask=whole, other=0)
    origin = window_origin(window, H * W * channels, W * channels, channels, DOWN, ACROSS, 2, 2)
    first = out + (origin[:, None] + channel[None, :])
    for corner in tl.static_range(4):
        step = (corner // 2 * W + corner % 2) * channels
        inside = (i * 2 + corner // 2 < H) & (j * 2 + corner % 2 < W)
        tl.store(first + step, tl.where(place == corner, value, 0.0), mask=valid & inside[:, None])


@lru_cache(maxsize=1024)
def _geometry(num_windows: int, channels: int, height: int, width: int) -> tuple[tuple[int, int], Mapping[str, int]]:
    """(grid: blocks of windows, of channels; sizes that a kernel is compiled for)."""
    block_c = min(_CHANNELS, power_of_2(channels))
    block_q = min(_TILE // block_c, power_of_2(num_windows))
    sizes = {"H": height, "W": width, "BLOCK_Q": block_q, "BLOCK_C": block_c}
    return (divide_up(num_windows, block_q), divide_up(channels, block_c)), sizes
