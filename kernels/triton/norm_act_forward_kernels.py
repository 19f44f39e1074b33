# mypy: allow-untyped-defs, allow-incomplete-defs
"""The Triton kernels of BatchNorm + LeakyReLU + latents + pooling, forward. `norm_act.py` launches them.

Coordinates: the plane H x W is tiled by GRID_H x GRID_W windows of WIN_H x WIN_W pixels; `window` counts windows over
the whole batch, `pixel` counts inside a window, a `row` is one pixel of one image (or one window, in `window_totals`).
A tile is [BLOCK_Q windows, BLOCK_K pixels, BLOCK_C channels]. All arithmetic is float32, reductions run in a fixed
order (no atomics), and offsets that grow with the batch are 64 bits wide.

[Note: merged statistics] A reduction over the batch takes two launches: `moments_kernel` and its like write one partial
result per program, and every program of the following full-tensor kernel merges the partial results of its own channels
again (a few kilobytes from the L2 cache), instead of waiting for a third launch or for a counter that would have to be
zeroed first. All programs merge in the same order, so all of them see the same bits.
"""

import triton
import triton.language as tl

__all__ = [
    "POOL_AVERAGE",
    "POOL_MAX",
    "POOL_NONE",
    "POOL_NOTHING",
    "STATISTICS_MERGE",
    "STATISTICS_READ",
    "STATISTICS_WHOLE",
    "forward_kernel",
    "moments_kernel",
    "row_offsets",
    "window_origin",
]

POOL_NOTHING = tl.constexpr(0)  # no output is written
POOL_NONE = tl.constexpr(1)
POOL_MAX = tl.constexpr(2)
POOL_AVERAGE = tl.constexpr(3)

STATISTICS_READ = tl.constexpr(0)  # already final in memory
STATISTICS_MERGE = tl.constexpr(1)  # from the partial results of the launch before
STATISTICS_WHOLE = tl.constexpr(2)  # a program holds all rows of its channels and computes them itself


@triton.jit
def row_offsets(row, stride_b, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr):
    """Offset of pixel `row` of the batch, in 64 bits."""
    image = row // (H * W)
    pixel = row % (H * W)
    return image.to(tl.int64) * stride_b + (pixel // W) * stride_h + (pixel % W) * stride_w


@triton.jit
def window_origin(window, stride_b, stride_h, stride_w, GRID_H: tl.constexpr, GRID_W: tl.constexpr, win_h, win_w):
    """Offset of the first pixel of `window`, in 64 bits."""
    image = window // (GRID_H * GRID_W)
    cell = window % (GRID_H * GRID_W)
    return image.to(tl.int64) * stride_b + (cell // GRID_W) * win_h * stride_h + (cell % GRID_W) * win_w * stride_w


@triton.jit
def _moments(
    conv, first, last, channel, channels, stride_b, stride_c, stride_h, stride_w,
    H: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of rows [first, last), per channel.

    Welford's update per slot of the tile (no reduction inside the loop), then an exact merge of the slots.
    """
    slot = tl.arange(0, BLOCK_R)
    mean = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    seen = 0.0
    for start in range(first, last, BLOCK_R):
        row = start + slot
        valid = (row < last)[:, None] & (channel < channels)[None, :]
        offsets = row_offsets(row, stride_b, stride_h, stride_w, H, W)[:, None] + (channel * stride_c)[None, :]
        x = tl.load(conv + offsets, mask=valid, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(valid, x - mean, 0.0)
        mean += delta * (1.0 / seen)
        squares += delta * (x - mean)
    count = tl.maximum((last - first - slot + BLOCK_R - 1) // BLOCK_R, 0).to(tl.float32)[:, None]
    total_mean = tl.sum(mean * count, 0) / (last - first)
    shift = mean - total_mean[None, :]
    return total_mean, tl.sum(squares + count * shift * shift, 0)


@triton.jit
def moments_kernel(
    conv, partials, num_rows, rows_per_partial, channels, stride_b, stride_c, stride_h, stride_w,
    H: tl.constexpr, W: tl.constexpr, PARTIALS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials [2, PARTIALS, C]: mean and sum of squared deviations of each run of `rows_per_partial` rows."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * rows_per_partial
    last = tl.minimum(first + rows_per_partial, num_rows)
    mean, squares = _moments(
        conv, first, last, channel, channels, stride_b, stride_c, stride_h, stride_w, H, W, BLOCK_R, BLOCK_C
    )
    slot = partials + part * channels + channel
    tl.store(slot, mean, mask=channel < channels)
    tl.store(slot + PARTIALS * channels, squares, mask=channel < channels)


@triton.jit
def _merge_moments(
    partials, num_rows, rows_per_partial, channel, channels,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merges the results of `moments_kernel` (Chan, Golub, LeVeque 1979, pairwise update)."""
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    done = 0.0
    for start in range(0, PARTIALS, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        rows = tl.minimum(tl.maximum(num_rows - part * rows_per_partial, 0), rows_per_partial).to(tl.float32)
        valid = (part < PARTIALS)[:, None] & (channel < channels)[None, :]
        slot = partials + part[:, None] * channels + channel[None, :]
        part_mean = tl.load(slot, mask=valid, other=0.0)
        part_squares = tl.load(slot + PARTIALS * channels, mask=valid, other=0.0)
        chunk = tl.minimum(num_rows - start * rows_per_partial, BLOCK_P * rows_per_partial).to(tl.float32)
        chunk_mean = tl.sum(part_mean * rows[:, None], 0) / chunk
        shift = part_mean - chunk_mean[None, :]
        total = done + chunk
        step = chunk_mean - mean
        squares += tl.sum(part_squares + rows[:, None] * shift * shift, 0) + step * step * (done * (chunk / total))
        mean += step * (chunk / total)
        done = total
    return mean, squares


@triton.jit
def _statistics(
    conv, conv_bias, running_mean, running_var, partials, mean_out, rstd_out,
    num_rows, rows_per_partial, channel, channels, momentum, eps, stride_b, stride_c, stride_h, stride_w,
    H: tl.constexpr, W: tl.constexpr, STATISTICS: tl.constexpr, PARTIALS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) per channel, from where STATISTICS says; the launch that finds them out keeps
    them and updates the running ones."""
    real = channel < channels
    if STATISTICS == STATISTICS_READ:
        mean = tl.load(mean_out + channel, mask=real, other=0.0)
        rstd = tl.load(rstd_out + channel, mask=real, other=0.0)
    else:
        if STATISTICS == STATISTICS_WHOLE:
            mean, squares = _moments(
                conv, 0, num_rows, channel, channels, stride_b, stride_c, stride_h, stride_w, H, W, BLOCK_R, BLOCK_C
            )
        else:
            mean, squares = _merge_moments(
                partials, num_rows, rows_per_partial, channel, channels, PARTIALS, BLOCK_P, BLOCK_C
            )
        rstd = 1.0 / tl.sqrt(squares / num_rows + eps)
        if tl.program_id(0) == 0:  # no other program reads these vectors during this launch
            tl.store(mean_out + channel, mean, mask=real)
            tl.store(rstd_out + channel, rstd, mask=real)
            new_mean = mean
            if conv_bias is not None:
                new_mean += tl.load(conv_bias + channel, mask=real, other=0.0).to(tl.float32)
            old_mean = tl.load(running_mean + channel, mask=real, other=0.0).to(tl.float32)
            old_var = tl.load(running_var + channel, mask=real, other=0.0).to(tl.float32)
            new_var = squares / tl.maximum(num_rows - 1, 1)
            tl.store(running_mean + channel, old_mean + momentum * (new_mean - old_mean), mask=real)
            tl.store(running_var + channel, old_var + momentum * (new_var - old_var), mask=real)
    return mean, rstd


@triton.jit
def forward_kernel(
    conv, weight, bias, conv_bias, running_mean, running_var, partials, mean_out, rstd_out,
    latents, mask_sums, mask_xhat_sums, output,
    num_rows, rows_per_partial, num_windows, num_tiles, channels, momentum, eps, negative_slope,
    stride_b, stride_c, stride_h, stride_w, out_stride_b, out_stride_c, out_stride_h, out_stride_w,
    H: tl.constexpr, W: tl.constexpr,
    GRID_H: tl.constexpr, GRID_W: tl.constexpr, WIN_H: tl.constexpr, WIN_W: tl.constexpr,
    STATISTICS: tl.constexpr, LATENTS: tl.constexpr, POOL: tl.constexpr,
    PARTIALS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalise, LeakyReLU, latents, window sums and the next layer's input, reading each element once."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    mean, rstd = _statistics(
        conv, conv_bias, running_mean, running_var, partials, mean_out, rstd_out,
        num_rows, rows_per_partial, channel, channels, momentum, eps, stride_b, stride_c, stride_h, stride_w,
        H, W, STATISTICS, PARTIALS, BLOCK_P, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    gain = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)[None, None, :]
    offset = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, None, :]
    mean = mean[None, None, :]
    rstd = rstd[None, None, :]
    conv_channel = conv + (channel * stride_c)[None, None, :]
    out_channel = output + channel * out_stride_c
    # Max pooling walks the four corners of its 2x2 windows as four tiles, so that the maximum is element by element.
    STEP: tl.constexpr = 2 if POOL == POOL_MAX else 1
    ROW: tl.constexpr = WIN_W // STEP
    PIXELS: tl.constexpr = (WIN_H // STEP) * ROW
    AREA: tl.constexpr = WIN_H * WIN_W
    CELLS: tl.constexpr = GRID_H * GRID_W
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        window = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        origin = window_origin(window, stride_b, stride_h, stride_w, GRID_H, GRID_W, WIN_H, WIN_W)[:, None, None]
        act_sum = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_C], tl.float32)
        mask_sum = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_C], tl.float32)
        mask_xhat_sum = tl.zeros([BLOCK_Q, BLOCK_K, BLOCK_C], tl.float32)
        for start in range(0, PIXELS, BLOCK_K):
            pixel = start + tl.arange(0, BLOCK_K)
            line = pixel // ROW
            column = pixel % ROW
            valid = (window < num_windows)[:, None, None] & (pixel < PIXELS)[None, :, None] & real[None, None, :]
            written = tl.full([BLOCK_Q, BLOCK_K, BLOCK_C], float("-inf"), tl.float32)
            for corner in tl.static_range(STEP * STEP):
                inside = (line * STEP + corner // STEP) * stride_h + (column * STEP + corner % STEP) * stride_w
                x = tl.load(conv_channel + (origin + inside[None, :, None]), mask=valid, other=0.0).to(tl.float32)
                xhat = (x - mean) * rstd
                y = xhat * gain + offset
                slope = tl.where(y > 0, 1.0, negative_slope)
                act = y * slope
                written = tl.maximum(written, act) if POOL == POOL_MAX else act
                if LATENTS or POOL == POOL_AVERAGE:
                    act_sum += tl.where(valid, act, 0.0)
                if LATENTS:
                    mask_sum += tl.where(valid, slope, 0.0)
                    mask_xhat_sum += tl.where(valid, slope * xhat, 0.0)
            if POOL == POOL_NONE or POOL == POOL_MAX:  # noqa: SIM109
                out_origin = window_origin(
                    window, out_stride_b, out_stride_h, out_stride_w, GRID_H, GRID_W, WIN_H // STEP, WIN_W // STEP
                )
                inside = out_origin[:, None, None] + (line * out_stride_h + column * out_stride_w)[None, :, None]
                tl.store(out_channel[None, None, :] + inside, written.to(output.dtype.element_ty), mask=valid)
        valid_window = (window < num_windows)[:, None] & real[None, :]
        if LATENTS or POOL == POOL_AVERAGE:
            average = tl.sum(act_sum, 1) / AREA
        if POOL == POOL_AVERAGE:
            out_origin = window_origin(window, out_stride_b, out_stride_h, out_stride_w, GRID_H, GRID_W, 1, 1)
            place = out_channel[None, :] + out_origin[:, None]
            tl.store(place, average.to(output.dtype.element_ty), mask=valid_window)
        if LATENTS:
            image = (window // CELLS).to(tl.int64)
            place = ((image * channels)[:, None] + channel[None, :]) * CELLS + (window % CELLS)[:, None]
            tl.store(latents + place, average.to(latents.dtype.element_ty), mask=valid_window)
            tl.store(mask_sums + place, tl.sum(mask_sum, 1), mask=valid_window)
            tl.store(mask_xhat_sums + place, tl.sum(mask_xhat_sum, 1), mask=valid_window)
