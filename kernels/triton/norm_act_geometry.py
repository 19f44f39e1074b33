"""Launch geometry of the norm_act kernels, chosen from the shape alone: no measuring at run time.

The number of programs never depends on the device, because the order of the sums does depend on it: the same shape
gives the same bits on every GPU of one kind, whatever else runs there.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from unlocked.kernels.triton.norm_act_forward_kernels import (
    POOL_AVERAGE,
    POOL_MAX,
    POOL_NONE,
    POOL_NOTHING,
    STATISTICS_MERGE,
    STATISTICS_READ,
    STATISTICS_WHOLE,
)

__all__ = [
    "Geometry",
    "Pass",
    "Reduction",
    "Shape",
    "backward_geometry",
    "divide_up",
    "forward_geometry",
    "power_of_2",
    "window_reduction",
]

WHOLE_ROWS = 1024  # up to here one program reads all rows of its channels, and one launch does everything
TILE = 2048  # elements of a tile: 16 per thread at 4 warps, so that four float32 tiles fit the registers
LARGE = 1 << 24  # elements from which bandwidth counts and latency doesn't
PROGRAMS = 8 * 132  # at most, per launch: eight on each multiprocessor of an H100
REDUCING_PROGRAMS = 256  # enough for every multiprocessor; each leaves a partial result that others have to read
PARTIALS_SMALL, PARTIALS_LARGE, BLOCK_P = 64, 256, 64
SECTOR = 32  # bytes that memory hands out at once


class Shape(NamedTuple):
    """What the geometry depends on. [B, C] is [B, C, 1, 1]."""

    batch: int
    channels: int
    height: int
    width: int
    channels_last: bool  # neighbouring channels are neighbours in memory
    itemsize: int

    @property
    def rows(self) -> int:
        return self.batch * self.height * self.width

    def cells(self, side: int) -> "_Windows":
        return _Windows(side, side, self.height // side, self.width // side)


class Reduction(NamedTuple):
    """A launch that writes partial results [2, partials, C]."""

    grid: tuple[int, int]
    num_warps: int
    partials: int
    rows_per_partial: int
    constants: Mapping[str, Any]


class Pass(NamedTuple):
    """A launch over the windows of the whole tensor."""

    grid: tuple[int, int]
    num_warps: int
    num_windows: int
    num_tiles: int
    constants: Mapping[str, Any]


class Geometry(NamedTuple):
    """The launches of one operation, in order. Without a reduction, the (only) pass does it too."""

    reduction: Reduction | None
    passes: tuple[Pass, ...]


class _Windows(NamedTuple):
    """How a pass tiles the plane. `step` is 2 where it walks the corners of 2x2 windows one after the other."""

    grid_h: int
    grid_w: int
    win_h: int
    win_w: int
    step: int = 1


@lru_cache(maxsize=1024)
def forward_geometry(shape: Shape, latent_size: int, pool: str, pool_size: int) -> Geometry:
    """One pass where the output's windows nest in the latents' windows, else one for the latents, one for the output.

    For [B, C] `latent_size` is 0 or 1.
    """
    output = {"none": POOL_NONE, "max": POOL_MAX, "average": POOL_AVERAGE}[pool].value
    cells = shape.cells(latent_size) if latent_size else None
    wanted: list[tuple[_Windows, bool, int]]  # windows, with latents?, kind of output
    if cells is not None and pool == "max" and cells.win_h % 2 == 0 and cells.win_w % 2 == 0:
        wanted = [(cells._replace(step=2), True, output)]
    elif cells is not None and (pool == "none" or (pool == "average" and pool_size == latent_size)):
        wanted = [(cells, True, output)]
    else:
        wanted = [] if cells is None else [(cells, True, POOL_NOTHING.value)]
        if pool == "max":  # lines of 2x2 windows; an odd last row or column belongs to none
            wanted.append((_Windows(shape.height // 2, 1, 2, shape.width // 2 * 2, step=2), False, output))
        elif pool == "average":
            wanted.append((shape.cells(pool_size), False, output))
        else:
            wanted.append((_Windows(shape.height, 1, 1, shape.width), False, output))
    whole = shape.rows <= WHOLE_ROWS
    reduction = None if whole else _row_reduction(shape, 8192)
    passes = []
    for index, (windows, latents, pooling) in enumerate(wanted):
        statistics = STATISTICS_READ if index else STATISTICS_WHOLE if whole else STATISTICS_MERGE
        extra = {"STATISTICS": statistics.value, "LATENTS": latents, "POOL": pooling}
        passes.append(_pass(shape, windows, reduction, shape.rows, extra))
    return Geometry(reduction, tuple(passes))


@lru_cache(maxsize=1024)
def backward_geometry(shape: Shape, latent_size: int) -> Geometry:
    """`latent_size` 0: the gradient is given at every activation."""
    windows = shape.cells(latent_size) if latent_size else _Windows(shape.height, 1, 1, shape.width)
    summed = shape.batch * latent_size * latent_size if latent_size else shape.rows
    reduction = None
    if shape.rows > WHOLE_ROWS:
        # The full gradient is loaded beside `conv`: a block of half the size, or registers are spilled.
        reduction = window_reduction(shape, latent_size * latent_size) if latent_size else _row_reduction(shape, 4096)
    statistics = STATISTICS_MERGE if reduction else STATISTICS_WHOLE
    extra = {"STATISTICS": statistics.value, "FULL": latent_size == 0}
    return Geometry(reduction, (_pass(shape, windows, reduction, summed, extra),))


def _pass(
    shape: Shape, windows: _Windows, reduction: Reduction | None, summed_rows: int, extra: dict[str, Any]
) -> Pass:
    """`summed_rows`: rows that a program adds up itself if it holds all rows of its channels."""
    grid_h, grid_w, win_h, win_w, step = windows
    num_windows = shape.batch * grid_h * grid_w
    pixels = (win_h // step) * (win_w // step)
    # Four corners of half the size are loaded together; and small windows of 16-bit values, where a thread's values lie
    # in several lines of the plane, spill registers on the way back.
    scattered = "FULL" in extra and not shape.channels_last and shape.itemsize == 2 and pixels <= 16
    elements = TILE // 2 if step == 2 or scattered else TILE
    whole = extra["STATISTICS"] == STATISTICS_WHOLE.value
    channels = power_of_2(shape.channels)
    if shape.channels_last:
        # 32 channels are a full cache line of float32; with all rows in one program, there is a program per sector.
        block_c = min(SECTOR // shape.itemsize if whole else 32, channels)
        block_k = min(power_of_2(pixels), elements // block_c)
        block_q = min(power_of_2(num_windows), elements // (block_c * block_k))
    else:
        block_k = min(power_of_2(pixels), elements)
        block_q = min(power_of_2(num_windows), elements // block_k)
        block_c = 1 if whole else min(channels, elements // (block_k * block_q))
    num_tiles = divide_up(num_windows, block_q)
    channel_blocks = divide_up(shape.channels, block_c)
    programs = 1 if whole else min(num_tiles, max(1, PROGRAMS // channel_blocks))
    partials = reduction.partials if reduction else 1
    constants = {
        "H": shape.height, "W": shape.width, "GRID_H": grid_h, "GRID_W": grid_w, "WIN_H": win_h, "WIN_W": win_w,
        "PARTIALS": partials, "BLOCK_P": min(BLOCK_P, power_of_2(partials)),
        "BLOCK_R": min(power_of_2(summed_rows), 4096 // block_c) if whole else 1,
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_C": block_c,
    }  # fmt: skip
    # Where a tile is a corner of the windows, two warps took 4.7 us and four 6.3 on an H200 (SmallConv's first layer).
    # Where a program holds all rows, that many values don't fit two warps' registers.
    num_warps = 2 if step == 2 and shape.channels_last and not whole else 4
    return Pass((programs, channel_blocks), num_warps, num_windows, num_tiles, constants | extra)


def _row_reduction(shape: Shape, elements: int) -> Reduction:
    """A reduction over all pixels of the batch, `elements` at a time. Small tensors are cut into sectors of channels:
    as many programs, with fewer partial results for each channel."""
    large = shape.rows * shape.channels >= LARGE
    block_c = 1
    if shape.channels_last:
        block_c = min(32 if large else SECTOR // shape.itemsize, power_of_2(shape.channels))
    most = PARTIALS_LARGE if large else PARTIALS_SMALL
    constants = {"H": shape.height, "W": shape.width}
    return _reduction(shape.rows, shape.channels, block_c, elements // block_c, most, max(1, 512 // block_c), constants)


def window_reduction(shape: Shape, cells: int) -> Reduction:
    """A reduction over tensors [B, C, cells], contiguous: a program reads at least a sector at a time."""
    block_c = min(max(1, 8 // power_of_2(cells)), power_of_2(shape.channels))
    block_r = 1024 // block_c
    return _reduction(shape.batch * cells, shape.channels, block_c, block_r, BLOCK_P, block_r, {"CELLS": cells})


def _reduction(
    rows: int, channels: int, block_c: int, block_r: int, most: int, least_rows: int, constants: dict[str, Any]
) -> Reduction:
    channel_blocks = divide_up(channels, block_c)
    partials = min(most, divide_up(REDUCING_PROGRAMS, channel_blocks), divide_up(rows, least_rows))
    rows_per_partial = divide_up(rows, partials)
    partials = divide_up(rows, rows_per_partial)
    block_r = min(block_r, power_of_2(rows_per_partial))
    constants |= {"PARTIALS": partials, "BLOCK_R": block_r, "BLOCK_C": block_c}
    num_warps = 8 if block_r * block_c >= 4096 else 4
    return Reduction((partials, channel_blocks), num_warps, partials, rows_per_partial, constants)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
