# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of a convolution's weight gradient with norm_act's way back inside (launched by `weight_grad.py`).

The gradient of kernel element n = (tap, input channel) of output channel c is a sum over all pixels of the batch,

    sum over pixels of conv_grad[pixel, c] * patches[pixel, n],

a product of two matrices neither of which exists: tile by tile, `conv_grad` is made from the convolution's output as
`backward_kernel` makes it, `patches` is read out of the input. `norm_act_forward_kernels.py` explains windows.

[Note: order of the pixels] Pixels are taken window after window, since a window's pixels share one gradient, in steps
of BLOCK_Q windows x BLOCK_K pixels of each. Every program adds up its own run of steps in order and leaves a partial
result; `weight_grad_sum_kernel` adds those up in order. The cuts depend on shapes alone: so do the bits.
"""

import triton
import triton.language as tl

from unlocked.kernels.triton.norm_act_backward_kernels import merge_totals
from unlocked.kernels.triton.norm_act_forward_kernels import window_origin

__all__ = ["weight_grad_kernel", "weight_grad_sum_kernel"]


@triton.jit
def _conv_grad(
    grad, conv, mean, rstd, gain, offset, dy_mean, dy_xhat_mean, window, pixel, channel, num_windows, channels,
    scale, negative_slope, stride_b, stride_c, stride_h, stride_w,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
):  # fmt: skip
    """The gradient at the convolution's output [windows, pixels of each, channels]. Outside of the data it is any
    number, which a zero of `_patches` meets."""
    CELLS: tl.constexpr = GRID_H * GRID_W
    inside = (window < num_windows)[:, None] & (channel < channels)[None, :]
    image = (window // CELLS).to(tl.int64)
    latent = ((image * channels)[:, None] + channel[None, :]) * CELLS + (window % CELLS)[:, None]
    window_grad = tl.load(grad + latent, mask=inside, other=0.0).to(tl.float32) * scale
    origin = window_origin(window, stride_b, stride_h, stride_w, GRID_H, GRID_W, WIN_H, WIN_W)
    place = (pixel // WIN_W) * stride_h + (pixel % WIN_W) * stride_w
    place = (channel * stride_c)[None, None, :] + (origin[:, None, None] + place[None, :, None])
    valid = inside[:, None, :] & (pixel < WIN_H * WIN_W)[None, :, None]
    x = tl.load(conv + place, mask=valid, other=0.0).to(tl.float32)
    xhat = (x - mean[None, None, :]) * rstd[None, None, :]
    y = xhat * gain[None, None, :] + offset[None, None, :]
    dy = window_grad[:, None, :] * tl.where(y > 0, 1.0, negative_slope)
    means = dy_mean[None, None, :] + xhat * dy_xhat_mean[None, None, :]
    return (gain * rstd)[None, None, :] * (dy - means)


@triton.jit
def _patches(
    source, window, pixel, column, num_windows, source_h, source_w, stride_b, stride_c, stride_h, stride_w,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
    SOURCE_C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """What each output pixel sees of the convolution's input [pixels, columns]; zero in the padding."""
    CELLS: tl.constexpr = GRID_H * GRID_W
    cell = window % CELLS
    top = ((cell // GRID_W) * WIN_H + pixel // WIN_W) * STEP_H - PAD_H
    left = ((cell % GRID_W) * WIN_W + pixel % WIN_W) * STEP_W - PAD_W
    tap = column // SOURCE_C
    down = (tap // KERNEL_W) * DILATION_H
    right = (tap % KERNEL_W) * DILATION_W
    line = top[:, None] + down[None, :]
    row = left[:, None] + right[None, :]
    valid = ((window < num_windows) & (pixel < WIN_H * WIN_W))[:, None] & (tap < KERNEL_H * KERNEL_W)[None, :]
    valid &= (line >= 0) & (line < source_h) & (row >= 0) & (row < source_w)
    origin = (window // CELLS).to(tl.int64) * stride_b + top * stride_h + left * stride_w
    place = (column % SOURCE_C) * stride_c + down * stride_h + right * stride_w
    return tl.load(source + (origin[:, None] + place[None, :]), mask=valid, other=0.0)


@triton.jit
def _to_tf32(values):
    """Rounded to the nearest of ten bits of mantissa, as the library does: tensor cores cut the others off."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [values], tl.float32, is_pure=True, pack=1)


@triton.jit
def weight_grad_kernel(
    grad, conv, mean_in, rstd_in, weight, bias, totals, source, partials, weight_grad, bias_grad,
    num_rows, num_windows, num_steps, steps_per_split, channels, scale, negative_slope, source_h, source_w,
    stride_b, stride_c, stride_h, stride_w, source_stride_b, source_stride_c, source_stride_h, source_stride_w,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
    SOURCE_C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partials [splits, C, N]: the product over each split's steps. Also BatchNorm's own two gradients [C].

    Program (n, c, split) makes BLOCK_N columns of BLOCK_C channels. `totals` [2, PARTIALS, C] are those of
    `window_totals_kernel`; PRECISION is "ieee" or "tf32", of the product of float32 tensors. WIDEN: 16-bit values are
    multiplied as float32, which changes nothing: Triton's interpreter would multiply the bits of bfloat16.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    mean = tl.load(mean_in + channel, mask=real, other=0.0)
    rstd = tl.load(rstd_in + channel, mask=real, other=0.0)
    gain = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    dy_sum, dy_xhat_sum = merge_totals(totals, channel, channels, PARTIALS, BLOCK_P, BLOCK_C)
    split = tl.program_id(2)
    if (tl.program_id(0) == 0) & (split == 0):
        tl.store(bias_grad + channel, dy_sum, mask=real)
        tl.store(weight_grad + channel, dy_xhat_sum, mask=real)
    dy_mean, dy_xhat_mean = dy_sum / num_rows, dy_xhat_sum / num_rows

    COLUMNS: tl.constexpr = SOURCE_C * KERNEL_H * KERNEL_W
    STEPS_OF_WINDOW: tl.constexpr = (WIN_H * WIN_W + BLOCK_K - 1) // BLOCK_K
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_Q * BLOCK_K)
    first = split * steps_per_split
    product = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for step in range(first, tl.minimum(first + steps_per_split, num_steps)):
        window = (step // STEPS_OF_WINDOW) * BLOCK_Q
        pixel = (step % STEPS_OF_WINDOW) * BLOCK_K
        conv_grad = _conv_grad(
            grad, conv, mean, rstd, gain, offset, dy_mean, dy_xhat_mean,
            window + tl.arange(0, BLOCK_Q), pixel + tl.arange(0, BLOCK_K), channel, num_windows, channels,
            scale, negative_slope, stride_b, stride_c, stride_h, stride_w, GRID_H, GRID_W, WIN_H, WIN_W,
        )  # fmt: skip
        patches = _patches(
            source, window + row // BLOCK_K, pixel + row % BLOCK_K, column, num_windows, source_h, source_w,
            source_stride_b, source_stride_c, source_stride_h, source_stride_w, GRID_H, GRID_W, WIN_H, WIN_W,
            SOURCE_C, KERNEL_H, KERNEL_W, STEP_H, STEP_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        conv_grad = tl.reshape(conv_grad, [BLOCK_Q * BLOCK_K, BLOCK_C]).to(patches.dtype)
        if WIDEN:
            patches, conv_grad = patches.to(tl.float32), conv_grad.to(tl.float32)
        if PRECISION == "tf32":
            patches, conv_grad = _to_tf32(patches), _to_tf32(conv_grad)
        product = tl.dot(tl.trans(conv_grad), patches, product, input_precision=PRECISION)
    place = (split * channels + channel).to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(partials + place, product, mask=real[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def weight_grad_sum_kernel(
    partials, kernel_grad, count, splits, stride_o, stride_i, stride_h, stride_w,
    SOURCE_C: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """kernel_grad [C, SOURCE_C, KERNEL_H, KERNEL_W], any strides, `count` values: the sum of all splits' `partials`."""
    COLUMNS: tl.constexpr = SOURCE_C * KERNEL_H * KERNEL_W
    element = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        valid = (split < splits)[:, None] & (element < count)[None, :]
        place = split.to(tl.int64)[:, None] * count + element[None, :]
        total += tl.sum(tl.load(partials + place, mask=valid, other=0.0), 0)
    column = element % COLUMNS
    tap = column // SOURCE_C
    place = (element // COLUMNS) * stride_o + (column % SOURCE_C) * stride_i
    place += (tap // KERNEL_W) * stride_h + (tap % KERNEL_W) * stride_w
    tl.store(kernel_grad + place, total.to(kernel_grad.dtype.element_ty), mask=element < count)
