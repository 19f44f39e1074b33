# mypy: allow-untyped-defs, allow-incomplete-defs
"""The input operation as one Triton kernel: gather, crop, flip, normalise, erase and the labels in one launch.

Same bits as unlocked.kernels.images, whose [Note: draws] says which random number decides what.
"""

import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.images import ERASE_BOXES, check_load_batch
from unlocked.kernels.philox import Purpose
from unlocked.kernels.triton.aot_spec import AotSpec

__all__ = ["AOT_SPECS", "load_batch"]

# Elements of a program. At B = 64 on 3 x 32 x 32 pixels it makes 192 programs, enough for the 132 processors of an
# H100, with eight independent loads in flight per thread.
_BLOCK = 1024
_MASK = 0xFFFFFFFF


@triton.jit
def _uniforms(sample, epoch, block, key, PURPOSE: tl.constexpr):
    """Four uniforms in [0, 1) of 24 bits: Philox 4x32-10 of counter (sample low, sample high, epoch, block)."""
    c0, c1 = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    zero = c0 * 0
    words = tl.philox_impl(c0, c1, epoch.to(tl.uint32), zero + block, zero + key.to(tl.uint32), zero + PURPOSE)
    w0, w1, w2, w3 = words
    scale = 1.0 / 16777216.0
    return (
        (w0 >> 8).to(tl.float32) * scale,
        (w1 >> 8).to(tl.float32) * scale,
        (w2 >> 8).to(tl.float32) * scale,
        (w3 >> 8).to(tl.float32) * scale,
    )


@triton.jit(do_not_specialize=["num_images", "order_length", "key"])
def _load_batch_kernel(
    images_ptr,  # [N, C, H, W], uint8
    labels_ptr,  # [N], int64
    order_ptr,  # [M], int64
    start_ptr,  # [], int64
    epoch_ptr,  # [], int64
    mean_ptr,  # [C], float32
    inv_std_ptr,  # [C], float32
    boxes_ptr,  # [ERASE_BOXES, 2], int32
    batch_ptr,  # [B, H, W, C] in memory, float32 or bfloat16
    targets_ptr,  # [B], int64
    num_images,
    order_length,
    key,
    erase_probability,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    PADDING: tl.constexpr,
    ERASE: tl.constexpr,
    BOXES: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """batch[b, i, j, c] = (pixel - mean[c]) * inv_std[c]: one program per sample and BLOCK of its values."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(start_ptr) + row
    known = (position >= 0) & (position < order_length)
    sample = tl.load(order_ptr + position, mask=known, other=0)
    # A micro-batch beyond the order is an error of the caller, which can't be reported without waiting for the
    # device: its rows become NaN with label -1, so that it shows, and no foreign memory is read.
    known = known & (sample >= 0) & (sample < num_images)
    VALUES: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    limit = tl.where(known, VALUES, 0)

    value = part * BLOCK + tl.arange(0, BLOCK)
    channel = value % CHANNELS
    i = value // CHANNELS // WIDTH
    j = value // CHANNELS % WIDTH
    source_i, source_j = i, j
    if FLIP or PADDING > 0:
        u0, u1, u2, _ = _uniforms(sample, tl.load(epoch_ptr), 0, key, PURPOSE)
        if FLIP:
            source_j = j + (u0 < 0.5).to(tl.int32) * (WIDTH - 1 - 2 * j)
        if PADDING > 0:
            source_i = i + (u1 * (2 * PADDING + 1)).to(tl.int32) - PADDING
            source_j = source_j + (u2 * (2 * PADDING + 1)).to(tl.int32) - PADDING
    inside = (source_i >= 0) & (source_i < HEIGHT) & (source_j >= 0) & (source_j < WIDTH)
    pixel_ptrs = images_ptr + sample * VALUES + (channel * HEIGHT + source_i) * WIDTH + source_j
    pixel = tl.load(pixel_ptrs, mask=inside & (value < limit), other=0).to(tl.float32)
    result = (pixel - tl.load(mean_ptr + channel)) * tl.load(inv_std_ptr + channel)
    if ERASE:
        u0, u1, u2, u3 = _uniforms(sample, tl.load(epoch_ptr), 1, key, PURPOSE)
        box = (u1 * BOXES).to(tl.int32) * 2
        box_height, box_width = tl.load(boxes_ptr + box), tl.load(boxes_ptr + box + 1)
        # A sample that keeps its pixels gets a box of no rows.
        rows = tl.where(u0 < erase_probability, box_height, 0)
        top = (u2 * (HEIGHT - box_height + 1).to(tl.float32)).to(tl.int32)
        left = (u3 * (WIDTH - box_width + 1).to(tl.float32)).to(tl.int32)
        erased = (i >= top) & (i < top + rows) & (j >= left) & (j < left + box_width)
        result = tl.where(erased, 0.0, result)
    result = tl.where(value < limit, result, float("nan"))
    tl.store(batch_ptr + row * VALUES + value, result.to(batch_ptr.dtype.element_ty), mask=value < VALUES)
    if part == 0:
        tl.store(targets_ptr + row, tl.load(labels_ptr + sample, mask=known, other=-1))


def load_batch(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    start: Tensor,
    size: int,
    *,
    mean: Tensor,
    inv_std: Tensor,
    seed: int,
    epoch: Tensor,
    flip: bool = False,
    crop_padding: int = 0,
    erase_probability: float = 0.0,
    erase_boxes: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As unlocked.kernels.images.load_batch, bit for bit, in one launch that a CUDA graph can capture."""
    boxes, (batch, targets) = check_load_batch(
        images, labels, order, start, size, mean, inv_std, epoch, crop_padding, erase_probability, erase_boxes, out
    )
    count, channels, height, width = images.shape
    values = channels * height * width
    block = min(_BLOCK, triton.next_power_of_2(values))
    _load_batch_kernel[(size, triton.cdiv(values, block))](
        images,
        labels,
        order,
        start,
        epoch,
        mean,
        inv_std,
        images if boxes is None else boxes,
        batch,
        targets,
        count,
        order.shape[0],
        _folded_key(seed),
        erase_probability,
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        FLIP=bool(flip),
        PADDING=crop_padding,
        ERASE=boxes is not None,
        BOXES=ERASE_BOXES,
        PURPOSE=int(Purpose.AUGMENT),
        BLOCK=block,
        num_warps=4 if block >= 512 else 1,
    )
    return batch, targets


def _folded_key(seed: int) -> int:
    """The first key word as philox.keyed_uniform folds the seed, as a signed 32-bit number: one type for all seeds."""
    word = (seed & _MASK) ^ ((seed >> 32 & _MASK) * 0x9E3779B1 & _MASK)
    return word - (1 << 32) if word >> 31 else word


def _aot_spec(name: str, shape: tuple[int, int, int], flip: bool, padding: int, erase: bool) -> AotSpec:
    channels, height, width = shape
    pointers = {"images_ptr": "*u8", "mean_ptr": "*fp32", "inv_std_ptr": "*fp32", "boxes_ptr": "*i32"}
    pointers |= {"batch_ptr": "*fp32", "labels_ptr": "*i64", "order_ptr": "*i64", "start_ptr": "*i64"}
    pointers |= {"epoch_ptr": "*i64", "targets_ptr": "*i64"}
    scalars = {"num_images": "i32", "order_length": "i32", "key": "i32", "erase_probability": "fp32"}
    constants = {"CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "FLIP": flip, "PADDING": padding}
    constants |= {"ERASE": erase, "BOXES": ERASE_BOXES, "PURPOSE": int(Purpose.AUGMENT), "BLOCK": _BLOCK}
    return AotSpec(f"load_batch {name}", _load_batch_kernel, pointers | scalars, constants)


AOT_SPECS = [
    _aot_spec("plain 3x32x32", (3, 32, 32), False, 0, False),
    _aot_spec("crop flip 3x32x32", (3, 32, 32), True, 4, False),
    _aot_spec("crop flip erase 3x32x32", (3, 32, 32), True, 4, True),
]
