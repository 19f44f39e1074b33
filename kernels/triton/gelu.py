# mypy: allow-untyped-defs, allow-incomplete-defs
"""GELU by the exact normal distribution, and back, in Triton: one launch forward, two back.

With Phi the distribution function and phi its density, y = x Phi(x), and y' = Phi(x) + x phi(x): the forward pass has
all of it in its hands, so it keeps y' and the way back is one multiplication. Results repeat bit by bit: the sums over
rows are those of runs of rows, added up by the second launch, both in an order that the shape alone decides.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.triton.norm_act import Launch, run_launches
from unlocked.kernels.triton.norm_act_geometry import PROGRAMS, TILE, divide_up, power_of_2

__all__ = [
    "gelu_backward",
    "gelu_backward_launches",
    "gelu_forward",
    "gelu_forward_launch",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_ROWS = 1 << 30  # rows are counted in 32 bits, with room to round up
_BLOCK = 1024  # elements of a program on the way forward: eight to a thread, whose error function takes many registers
_COLUMNS, _SUM_COLUMNS, _SUM_ROWS = 64, 32, 32  # of a tile on the way back, and of the partial sums


def gelu_forward(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(x Phi(x), its derivative), both like `x`, with Phi the normal distribution function.

    Args:
        x: float32, bfloat16 or float16, dense, of any shape.
        in_place: the derivative takes its place.

    Raises:
        ValueError: another type; gaps or repetitions in memory.
    """
    _check_type(x)
    result, launch = gelu_forward_launch(x, in_place=in_place)
    if result[0].stride() != x.stride():  # which only a dense tensor hands down
        raise ValueError(f"x must be dense, got {tuple(x.shape)} with strides {x.stride()}")
    if x.numel():
        run_launches(x, [launch])
    return result


def gelu_backward(grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(grad * slope, in the place of `slope`; its sums over all but the last dimension, [D] float32).

    Args:
        grad: [..., D], like `slope`; of [B, T, D] a view of [B, 1, D] may be read as it is.
        slope: contiguous.

    Raises:
        ValueError: a type, shape or layout that does not fit; 2**30 rows or more.
    """
    _check_type(slope)
    if grad.shape != slope.shape or grad.device != slope.device or not slope.is_contiguous() or not slope.dim():
        raise ValueError(
            f"slope must be contiguous and grad like it, got {tuple(slope.shape)} on {slope.device} with strides "
            f"{slope.stride()} and {tuple(grad.shape)} on {grad.device}"
        )
    if slope.numel() // max(slope.shape[-1], 1) >= _MAX_ROWS:
        raise ValueError(f"there must be fewer than 2**30 rows, got {tuple(slope.shape)}; use a smaller batch")
    if not slope.numel():
        return slope, slope.new_zeros(slope.shape[-1], dtype=torch.float32)
    repeats = grad.shape[1] if grad.dim() == 3 and grad.stride(1) == 0 else 1
    grad = grad[:, 0].contiguous() if repeats > 1 else grad.contiguous()
    sums, launches = gelu_backward_launches(grad, slope, repeats)
    run_launches(slope, launches)
    return slope, sums


def gelu_forward_launch(x: Tensor, *, in_place: bool = False) -> tuple[tuple[Tensor, Tensor], Launch]:
    """What `gelu_forward` gives, in buffers that are still to be filled, and the launch that fills them."""
    y, slope = torch.empty_like(x), x if in_place else torch.empty_like(x)
    grid = (divide_up(x.numel(), _BLOCK),)
    return (y, slope), Launch(gelu_forward_kernel, grid, 4, (x, y, slope, x.numel()), {"BLOCK": _BLOCK})


def gelu_backward_launches(grad: Tensor, slope: Tensor, repeats: int) -> tuple[Tensor, list[Launch]]:
    """The sums that `gelu_backward` gives, and its launches, in order.

    Args:
        grad: contiguous, a row for each `repeats` of `slope`.
    """
    columns = slope.shape[-1]
    rows = slope.numel() // columns
    grid, rows_per_partial, constants = _geometry(rows, columns)
    partials = slope.new_empty((grid[0], columns), dtype=torch.float32)
    sums = slope.new_empty(columns, dtype=torch.float32)
    arguments = (grad, slope, partials, rows, columns, repeats, rows_per_partial)
    blocks = {"BLOCK_R": _SUM_ROWS, "BLOCK_C": _SUM_COLUMNS}
    return sums, [
        Launch(gelu_backward_kernel, grid, 4, arguments, constants),
        Launch(gelu_sums_kernel, (divide_up(columns, _SUM_COLUMNS),), 4, (partials, sums, grid[0], columns), blocks),
    ]


@triton.jit
def gelu_forward_kernel(x, y, slope, count, BLOCK: tl.constexpr):
    """`slope` may be `x`: an element is read and written by one thread."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = place < count
    value = tl.load(x + place, mask=valid, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)  # Phi
    density = 0.3989422804014327 * tl.exp(value * value * -0.5)  # phi
    tl.store(y + place, (value * below).to(y.dtype.element_ty), mask=valid)
    tl.store(slope + place, (below + value * density).to(slope.dtype.element_ty), mask=valid)


@triton.jit
def gelu_backward_kernel(
    grad, slope, partials, num_rows, columns, repeats, rows_per_partial,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`slope` [rows, columns] becomes the product, partials [runs of rows, columns] its sums, before it is rounded."""
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = part * rows_per_partial
    last = tl.minimum(first + rows_per_partial, num_rows)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < last)[:, None] & (column < columns)[None, :]
        source = (row // repeats).to(tl.int64)[:, None] * columns + column[None, :]
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(grad + source, mask=valid, other=0.0).to(tl.float32)
        value *= tl.load(slope + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(slope + place, value.to(slope.dtype.element_ty), mask=valid)
        total += value
    tl.store(partials + part.to(tl.int64) * columns + column, tl.sum(total, 0), mask=column < columns)


@triton.jit
def gelu_sums_kernel(partials, sums, num_partials, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums [columns] of partials [num_partials, columns]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, num_partials, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        valid = (row < num_partials)[:, None] & (column < columns)[None, :]
        total += tl.load(partials + (row.to(tl.int64)[:, None] * columns + column[None, :]), mask=valid, other=0.0)
    tl.store(sums + column, tl.sum(total, 0), mask=column < columns)


def _check_type(tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"GELU's kernels take float32, bfloat16 or float16, got {tensor.dtype}")


@lru_cache(maxsize=1024)
def _geometry(rows: int, columns: int) -> tuple[tuple[int, int], int, Mapping[str, int]]:
    """(grid: runs of rows, blocks of columns; rows of a run; sizes that the kernel is compiled for)."""
    block_c = min(_COLUMNS, power_of_2(columns))
    block_r = min(TILE // block_c, power_of_2(rows))
    column_blocks = divide_up(columns, block_c)
    tiles = divide_up(rows, block_r)
    rows_per_partial = block_r * divide_up(tiles, min(tiles, max(1, PROGRAMS // column_blocks)))
    sizes = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    return (divide_up(rows, rows_per_partial), column_blocks), rows_per_partial, sizes
