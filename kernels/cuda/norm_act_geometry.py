"""How the work on a tensor [B, C, H, W] is shared out: windows, teams of threads, partial sums. Plain integers."""

from functools import lru_cache
from math import gcd

from unlocked.kernels.cuda.bindings import Geometry
from unlocked.kernels.cuda.build import CHUNK, REDUCE_THREADS, THREADS

__all__ = ["backward_geometry", "forward_geometries", "full_backward_geometry", "vector_width"]

WARP = 32
_COLUMN_ROWS = REDUCE_THREADS // WARP  # images that a block of window_sums_kernel reads at a time
# The kernels count windows and a plane's values in 32 bits, and a loop's counter goes one step beyond its end. No step
# is above 2**20: the longest is all blocks' teams (6 per SM of at most 256 teams: 600 SMs), or 4 loads of 256 teams.
_LIMIT = 2**31 - 2**20
# Enough threads to hide the latency of their loads without making each one's share tiny: 8192 windows' teams of
# SmallConv's first layer at batch 64 get eight loads per thread.
_THREADS_PER_SM = 384
_BLOCKS_PER_SM = 6

Shape = tuple[int, int, int, int]


def vector_width(channels: int, channels_last: bool, item_size: int, *addresses: int) -> int:
    """Neighbouring values that one 16-byte access moves, or 1 where alignment or layout forbids it."""
    width = 16 // item_size
    aligned = channels_last and channels % width == 0 and all(address % 16 == 0 for address in addresses)
    return width if aligned else 1


@lru_cache(maxsize=1024)
def forward_geometries(
    shape: Shape, channels_last: bool, width: int, sms: int, latent_size: int, cell: tuple[int, int]
) -> tuple[Geometry, Geometry | None]:
    """The launch that writes latents and output, or, where the cells of the output don't nest in the windows of the
    latents, the launch for the latents and the one for the output.

    Args:
        width: the vector width.
        latent_size: the side of the latents' grid, 0 for none.
        cell: pixels of one output value, (1, 1) without pooling.
    """
    if latent_size == 0:
        return _output_geometry(shape, channels_last, width, sms, cell), None
    window = (shape[2] // latent_size, shape[3] // latent_size)
    if window[0] % cell[0] == 0 and window[1] % cell[1] == 0:
        return _geometry(shape, channels_last, width, sms, (latent_size, latent_size), window, cell), None
    return (
        _geometry(shape, channels_last, width, sms, (latent_size, latent_size), window, (1, 1)),
        _output_geometry(shape, channels_last, width, sms, cell),
    )


@lru_cache(maxsize=1024)
def backward_geometry(
    shape: Shape, channels_last: bool, width: int, sms: int, latent_size: int
) -> tuple[Geometry, int, int]:
    """(geometry, fold, partial sums per channel and group) for a gradient that is constant over windows."""
    batch, channels, height, image_width = shape
    window = (height // latent_size, image_width // latent_size)
    geometry = _geometry(shape, channels_last, width, sms, (latent_size, latent_size), window, (1, 1))
    windows = latent_size * latent_size
    column_blocks = _ceil(channels * windows, WARP)
    wanted = min(_ceil(batch, _COLUMN_ROWS), max(1, 2 * sms // column_blocks))
    geometry.group_rows = _ceil(batch, wanted)
    geometry.groups = _ceil(batch, geometry.group_rows)
    fold = gcd(windows, WARP)
    return geometry, fold, windows // fold


@lru_cache(maxsize=1024)
def full_backward_geometry(shape: Shape, channels_last: bool, width: int, sms: int) -> Geometry:
    """For a gradient at every activation."""
    return _output_geometry(shape, channels_last, width, sms, (1, 1))


def _output_geometry(shape: Shape, channels_last: bool, width: int, sms: int, cell: tuple[int, int]) -> Geometry:
    """Windows that only share out the output: whole images, or rows of cells where that makes too few threads."""
    batch, _, height, image_width = shape
    rows, columns = height // cell[0], image_width // cell[1]
    lanes, slots, chunks = _teams(shape, channels_last, width, THREADS)
    few = batch * chunks * lanes * min(slots, _power_of_two_up_to(rows * columns)) < sms * _THREADS_PER_SM
    grid = (rows, 1) if few else (1, 1)
    window = (rows // grid[0] * cell[0], columns * cell[1])
    return _geometry(shape, channels_last, width, sms, grid, window, cell)


def _geometry(
    shape: Shape,
    channels_last: bool,
    width: int,
    sms: int,
    grid: tuple[int, int],
    window: tuple[int, int],
    cell: tuple[int, int],
) -> Geometry:
    batch, channels, height, image_width = shape
    plane, windows = height * image_width, batch * grid[0] * grid[1]
    lanes, slots, chunks = _teams(shape, channels_last, width, THREADS)
    if channels * plane >= _LIMIT or windows >= _LIMIT or chunks > 65535:
        raise ValueError(
            f"the CUDA kernels take images of less than 2**31 - 2**20 values, less than 2**31 - 2**20 windows and at "
            f"most 65535 groups of channels, got {list(shape)}; use --kernels torch"
        )
    cells = (window[0] // cell[0]) * (window[1] // cell[1])
    most, splits = min(slots, _power_of_two_up_to(cells)), 1
    while splits < most and windows * splits * lanes * chunks < sms * _THREADS_PER_SM:
        splits *= 2
    tiles = _ceil(windows, slots // splits)
    geometry = Geometry(batch=batch, channels=channels, height=height, width=image_width)
    geometry.grid_h, geometry.grid_w = grid
    geometry.window_h, geometry.window_w = window
    geometry.cell_h, geometry.cell_w = cell
    geometry.out_h, geometry.out_w = height // cell[0], image_width // cell[1]
    geometry.splits = splits
    geometry.blocks = min(tiles, _ceil(sms * _BLOCKS_PER_SM, chunks))
    geometry.channels_last, geometry.wide = int(channels_last), int(width > 1)
    # Partial sums over pixels: at least two loads per thread, and one block per SM over all channels.
    rows = batch * plane
    _, reduce_slots, _ = _teams(shape, channels_last, width, REDUCE_THREADS)
    wanted = min(_ceil(rows, 2 * reduce_slots), max(1, sms // chunks))
    geometry.group_rows = _ceil(rows, wanted)
    geometry.groups = _ceil(rows, geometry.group_rows)
    return geometry


def _teams(shape: Shape, channels_last: bool, width: int, threads: int) -> tuple[int, int, int]:
    """(threads across the channels of a pixel, teams per block, chunks of channels): `Lanes` of common.cuh."""
    lanes = CHUNK // width if channels_last else 1
    return lanes, threads // lanes, _ceil(shape[1], CHUNK) if channels_last else shape[1]


def _power_of_two_up_to(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
