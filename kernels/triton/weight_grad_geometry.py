"""Launch geometry of the weight gradient's kernels, chosen from shapes alone, as that of norm_act is."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from unlocked.kernels.triton.norm_act_geometry import (
    BLOCK_P,
    Reduction,
    Shape,
    divide_up,
    power_of_2,
    window_reduction,
)

__all__ = ["Convolution", "WeightGradGeometry", "weight_grad_geometry"]

# Of one step's pixels of a channel: 64 of float32, 128 of bfloat16, in eight warps. Half as many in four took 17.2 us
# in place of 11.8 on an H200 (SmallConv's first layer in tf32); as many in four spill. Beside a wide tile they would
# need more shared memory than GPUs of 99 KiB have; and 16-bit values whose channels lie apart spill (Triton 3.6).
STEP_BYTES, NARROW, SMALL_STEP_BYTES = 256, 64, 128
TILE_CHANNELS = 64  # of a program's product
# Its columns, as many as registers hold beside what they are made of. Few of them: the output is read more often.
TF32_COLUMNS, HALF_COLUMNS, PLAIN_COLUMNS = 128, 64, 32
LEAST_TILE = 16  # what a product on tensor cores needs of every side
PROGRAMS, MOST_WAVES = 132, 4  # one on each multiprocessor of an H100, more where each has enough to do
STEPS_OF_A_WAVE = 16
SUM_TILE = 2048


class Convolution(NamedTuple):
    """What the geometry depends on besides the output's shape: a convolution of one group.

    Attributes:
        source: the input's (channels, height, width).
    """

    source: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def columns(self) -> int:
        """Kernel elements of one output channel."""
        return self.source[0] * self.kernel[0] * self.kernel[1]


class WeightGradGeometry(NamedTuple):
    """Three launches: sums over windows, the product, and the sum over its splits."""

    reduction: Reduction
    grid: tuple[int, int, int]
    num_warps: int
    num_windows: int
    num_steps: int
    steps_per_split: int
    constants: Mapping[str, Any]
    sum_grid: tuple[int, int]
    sum_constants: Mapping[str, Any]

    @property
    def splits(self) -> int:
        return self.grid[2]


@lru_cache(maxsize=1024)
def weight_grad_geometry(shape: Shape, latent_size: int, convolution: Convolution, *, tf32: bool) -> WeightGradGeometry:
    """`shape`: of the convolution's output, whose plane `latent_size` x `latent_size` windows tile.

    Args:
        tf32: float32 tensors are multiplied on tensor cores, as 16-bit ones are.
    """
    windows = shape.cells(latent_size)
    num_windows, pixels = shape.batch * latent_size**2, windows.win_h * windows.win_w
    columns = convolution.columns
    block_c = max(LEAST_TILE, min(power_of_2(shape.channels), TILE_CHANNELS))
    most_columns = HALF_COLUMNS if shape.itemsize < 4 else TF32_COLUMNS if tf32 else PLAIN_COLUMNS
    block_n = max(LEAST_TILE, min(power_of_2(columns), most_columns))
    apart = shape.itemsize < 4 and not shape.channels_last
    step_bytes = SMALL_STEP_BYTES if apart or block_n > NARROW else STEP_BYTES
    step_pixels = step_bytes // shape.itemsize
    block_k = min(power_of_2(pixels), step_pixels)
    block_q = step_pixels // block_k
    num_steps = divide_up(num_windows, block_q) * divide_up(pixels, block_k)
    tiles = divide_up(columns, block_n), divide_up(shape.channels, block_c)
    all_tiles = tiles[0] * tiles[1]
    waves = min(MOST_WAVES, max(1, all_tiles * num_steps // (PROGRAMS * STEPS_OF_A_WAVE)))
    steps_per_split = divide_up(num_steps, max(1, waves * PROGRAMS // all_tiles))
    splits = divide_up(num_steps, steps_per_split)
    reduction = window_reduction(shape, latent_size**2)
    kernel = {"SOURCE_C": convolution.source[0], "KERNEL_H": convolution.kernel[0], "KERNEL_W": convolution.kernel[1]}
    constants = {
        "GRID_H": latent_size, "GRID_W": latent_size, "WIN_H": windows.win_h, "WIN_W": windows.win_w, **kernel,
        "STEP_H": convolution.stride[0], "STEP_W": convolution.stride[1],
        "PAD_H": convolution.padding[0], "PAD_W": convolution.padding[1],
        "DILATION_H": convolution.dilation[0], "DILATION_W": convolution.dilation[1],
        "PARTIALS": reduction.partials, "BLOCK_P": min(BLOCK_P, power_of_2(reduction.partials)),
        "BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_C": block_c, "BLOCK_N": block_n,
    }  # fmt: skip
    count = columns * shape.channels
    block_s = min(power_of_2(splits), SUM_TILE // LEAST_TILE)
    block_e = SUM_TILE // block_s
    return WeightGradGeometry(
        reduction, (*tiles, splits), 4 if block_n > NARROW else 8, num_windows, num_steps, steps_per_split, constants,
        (divide_up(count, block_e), 1), {**kernel, "BLOCK_S": block_s, "BLOCK_E": block_e},
    )  # fmt: skip
