# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of norm_act's way back. `norm_act_forward_kernels.py` explains coordinates, tiles and the merging
of partial results.
"""

import triton
import triton.language as tl

from unlocked.kernels.triton.norm_act_forward_kernels import STATISTICS_MERGE, row_offsets, window_origin

__all__ = ["backward_kernel", "full_totals_kernel", "merge_totals", "window_totals_kernel"]


@triton.jit
def _window_totals(
    grad, mask_sums, mask_xhat_sums, first, last, channel, channels, scale,
    CELLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum(dy) and sum(dy * xhat) per channel over windows [first, last), from the forward pass's window sums."""
    dy_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dy_xhat_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < last)[:, None] & (channel < channels)[None, :]
        image = (row // CELLS).to(tl.int64)
        place = ((image * channels)[:, None] + channel[None, :]) * CELLS + (row % CELLS)[:, None]
        window_grad = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32) * scale
        dy_sum += window_grad * tl.load(mask_sums + place, mask=valid, other=0.0)
        dy_xhat_sum += window_grad * tl.load(mask_xhat_sums + place, mask=valid, other=0.0)
    return tl.sum(dy_sum, 0), tl.sum(dy_xhat_sum, 0)


@triton.jit
def window_totals_kernel(
    grad, mask_sums, mask_xhat_sums, partials, num_windows, rows_per_partial, channels, scale,
    CELLS: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [2, PARTIALS, C]: sum(dy) and sum(dy * xhat) of each run of `rows_per_partial` windows."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * rows_per_partial
    last = tl.minimum(first + rows_per_partial, num_windows)
    dy_sum, dy_xhat_sum = _window_totals(
        grad, mask_sums, mask_xhat_sums, first, last, channel, channels, scale, CELLS, BLOCK_R, BLOCK_C
    )
    slot = partials + part * channels + channel
    tl.store(slot, dy_sum, mask=channel < channels)
    tl.store(slot + PARTIALS * channels, dy_xhat_sum, mask=channel < channels)


@triton.jit
def _full_totals(
    grad, conv, mean, rstd, gain, offset, first, last, channel, channels, negative_slope,
    stride_b, stride_c, stride_h, stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    H: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum(dy) and sum(dy * xhat) per channel over rows [first, last), from a gradient at every activation."""
    dy_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    dy_xhat_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < last)[:, None] & (channel < channels)[None, :]
        place = row_offsets(row, stride_b, stride_h, stride_w, H, W)[:, None] + (channel * stride_c)[None, :]
        x = tl.load(conv + place, mask=valid, other=0.0).to(tl.float32)
        place = row_offsets(row, grad_stride_b, grad_stride_h, grad_stride_w, H, W)[:, None]
        dy = tl.load(grad + (place + (channel * grad_stride_c)[None, :]), mask=valid, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * rstd[None, :]
        y = xhat * gain[None, :] + offset[None, :]
        dy = dy * tl.where(y > 0, 1.0, negative_slope)
        dy_sum += dy
        dy_xhat_sum += dy * xhat
    return tl.sum(dy_sum, 0), tl.sum(dy_xhat_sum, 0)


@triton.jit
def full_totals_kernel(
    grad, conv, mean, rstd, weight, bias, partials, num_rows, rows_per_partial, channels, negative_slope,
    stride_b, stride_c, stride_h, stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    H: tl.constexpr, W: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `window_totals_kernel`, from a gradient at every activation."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    first = part * rows_per_partial
    last = tl.minimum(first + rows_per_partial, num_rows)
    dy_sum, dy_xhat_sum = _full_totals(
        grad, conv, tl.load(mean + channel, mask=real, other=0.0), tl.load(rstd + channel, mask=real, other=0.0),
        tl.load(weight + channel, mask=real, other=0.0).to(tl.float32),
        tl.load(bias + channel, mask=real, other=0.0).to(tl.float32),
        first, last, channel, channels, negative_slope,
        stride_b, stride_c, stride_h, stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
        H, W, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    slot = partials + part * channels + channel
    tl.store(slot, dy_sum, mask=real)
    tl.store(slot + PARTIALS * channels, dy_xhat_sum, mask=real)


@triton.jit
def merge_totals(partials, channel, channels, PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Adds up the results of `window_totals_kernel` or `full_totals_kernel`."""
    dy_sum = tl.zeros([BLOCK_C], tl.float32)
    dy_xhat_sum = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, PARTIALS, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        slot = partials + part[:, None] * channels + channel[None, :]
        valid_part = (part < PARTIALS)[:, None] & (channel < channels)[None, :]
        dy_sum += tl.sum(tl.load(slot, mask=valid_part, other=0.0), 0)
        dy_xhat_sum += tl.sum(tl.load(slot + PARTIALS * channels, mask=valid_part, other=0.0), 0)
    return dy_sum, dy_xhat_sum


@triton.jit
def backward_kernel(
    grad, conv, mean_in, rstd_in, weight, bias, mask_sums, mask_xhat_sums, partials,
    conv_grad, weight_grad, bias_grad,
    num_rows, num_windows, num_tiles, channels, scale, negative_slope,
    stride_b, stride_c, stride_h, stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
    out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    H: tl.constexpr, W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
    STATISTICS: tl.constexpr, FULL: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """weight * rstd * (dy - (sum(dy) + xhat * sum(dy * xhat)) / count), dy = gradient at the activation * slope.

    FULL: `grad` is like `conv`; else it is [B, C, GRID_H, GRID_W], to be multiplied by `scale` = 1 / window area.
    """
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    mean = tl.load(mean_in + channel, mask=real, other=0.0)
    rstd = tl.load(rstd_in + channel, mask=real, other=0.0)
    gain = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    CELLS: tl.constexpr = GRID_H * GRID_W
    if STATISTICS == STATISTICS_MERGE:
        dy_sum, dy_xhat_sum = merge_totals(partials, channel, channels, PARTIALS, BLOCK_P, BLOCK_C)
    elif FULL:
        dy_sum, dy_xhat_sum = _full_totals(
            grad, conv, mean, rstd, gain, offset, 0, num_rows, channel, channels, negative_slope,
            stride_b, stride_c, stride_h, stride_w, grad_stride_b, grad_stride_c, grad_stride_h, grad_stride_w,
            H, W, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        dy_sum, dy_xhat_sum = _window_totals(
            grad, mask_sums, mask_xhat_sums, 0, num_windows, channel, channels, scale, CELLS, BLOCK_R, BLOCK_C
        )
    if tl.program_id(0) == 0:
        tl.store(bias_grad + channel, dy_sum, mask=real)
        tl.store(weight_grad + channel, dy_xhat_sum, mask=real)

    dy_mean = (dy_sum / num_rows)[None, None, :]
    dy_xhat_mean = (dy_xhat_sum / num_rows)[None, None, :]
    factor = (gain * rstd)[None, None, :]
    mean, rstd = mean[None, None, :], rstd[None, None, :]
    gain, offset = gain[None, None, :], offset[None, None, :]
    PIXELS: tl.constexpr = WIN_H * WIN_W
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        window = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        origin = window_origin(window, stride_b, stride_h, stride_w, GRID_H, GRID_W, WIN_H, WIN_W)
        out_origin = window_origin(window, out_stride_b, out_stride_h, out_stride_w, GRID_H, GRID_W, WIN_H, WIN_W)
        if not FULL:
            image = (window // CELLS).to(tl.int64)
            latent = ((image * channels)[:, None] + channel[None, :]) * CELLS + (window % CELLS)[:, None]
            valid_window = (window < num_windows)[:, None] & real[None, :]
            window_grad = tl.load(grad + latent, mask=valid_window, other=0.0).to(tl.float32) * scale
        for start in range(0, PIXELS, BLOCK_K):
            pixel = start + tl.arange(0, BLOCK_K)
            line = pixel // WIN_W
            column = pixel % WIN_W
            valid = (window < num_windows)[:, None, None] & (pixel < PIXELS)[None, :, None] & real[None, None, :]
            place = origin[:, None, None] + (line * stride_h + column * stride_w)[None, :, None]
            x = tl.load(conv + ((channel * stride_c)[None, None, :] + place), mask=valid, other=0.0).to(tl.float32)
            if FULL:
                grad_origin = window_origin(
                    window, grad_stride_b, grad_stride_h, grad_stride_w, GRID_H, GRID_W, WIN_H, WIN_W
                )
                place = grad_origin[:, None, None] + (line * grad_stride_h + column * grad_stride_w)[None, :, None]
                place = (channel * grad_stride_c)[None, None, :] + place
                act_grad = tl.load(grad + place, mask=valid, other=0.0).to(tl.float32)
            else:
                act_grad = window_grad[:, None, :]
            xhat = (x - mean) * rstd
            y = xhat * gain + offset
            dy = act_grad * tl.where(y > 0, 1.0, negative_slope)
            result = factor * (dy - (dy_mean + xhat * dy_xhat_mean))
            place = out_origin[:, None, None] + (line * out_stride_h + column * out_stride_w)[None, :, None]
            place = (channel * out_stride_c)[None, None, :] + place
            tl.store(conv_grad + place, result.to(conv_grad.dtype.element_ty), mask=valid)
