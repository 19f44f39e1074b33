"""The input operation in plain PyTorch: a micro-batch out of a resident uint8 data set, augmented and normalised.

Shapes: N images in the data set, B in the micro-batch, C channels, H x W pixels, M entries of the epoch's order.

[Note: draws] Every random number is Philox output with the key (seed, Purpose.AUGMENT) and the counter (index of the
sample in the data set, epoch, block), so that a sample is augmented alike whatever the placement, the micro-batch it
falls into or the device. The four uniforms u0 .. u3 of a block mean:

    block 0: u0 < 0.5 flips; crop row offset floor(u1 (2 pad + 1)); crop column offset floor(u2 (2 pad + 1)), where pad
             is the padding, or the margin of images that are stored larger than they are read
    block 1: u0 < erase_probability erases; box number floor(u1 4096), of h x w pixels; its top row
             floor(u2 (H - h + 1)) and left column floor(u3 (W - w + 1))

The order of the steps is that of the usual torchvision pipeline: random crop of the zero-padded uint8 image,
horizontal flip, normalisation, random erasing with 0.0.
"""

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels.philox import Purpose, keyed_uniform

__all__ = ["ERASE_BOXES", "check_load_batch", "load_batch", "make_erase_boxes", "sides_of"]

ERASE_BOXES = 4096  # boxes in the table: a draw of 24 bits picks each with the same probability

_ERASE_SCALE = (0.02, 0.33)  # torchvision.transforms.RandomErasing's defaults
_ERASE_RATIO = (0.3, 3.3)
_ERASE_TRIES = 10
_TABLE_BLOCK = 2  # the block of the table's draws, so that they share no counter with the samples' blocks 0 and 1


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
    margin: int = 0,
    crop_margin: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The micro-batch order[start : start + size], augmented as [Note: draws] says, and its labels.

    A pixel becomes (float(pixel) - mean) * inv_std, subtracted first and multiplied second: no fused multiply-add can
    contract that, so every device gives the same bits. Padding is the pixel value 0, before the normalisation.

    Args:
        images: [N, C, H, W], uint8, contiguous.
        labels: [N], int64.
        order: [M], int64: indices of samples, the epoch's permutation for instance.
        start: [], int64, on the images' device (a CUDA graph advances it): start + size <= M. It is checked here on
            the CPU only; a device can't be asked without waiting for it.
        size: B, at least 1.
        mean, inv_std: [C], float32, in units of 0 .. 255.
        epoch: [], int64, on the images' device.
        flip: flip left to right with probability 1/2.
        crop_padding: crop H x W pixels out of the image with this many zero pixels on each side.
        erase_probability: in [0, 1]; above 0 it needs `erase_boxes`.
        erase_boxes: the table of `make_erase_boxes`, int32 [4096, 2], on the images' device.
        margin: pixels on every side that are cut off: H and W of the result are smaller by twice as much. Only this
            backend has it.
        crop_margin: cut the result out at a random place instead of the middle (then `crop_padding` is 0).
        out: buffers for the two results; images of bfloat16 get the rounded float32 values.

    Returns:
        Images [B, C, H, W], float32, in channels-last memory format, and labels [B], int64.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
    """
    data, key, options = (images, labels, order, start, size), (mean, inv_std, epoch), (crop_padding, erase_probability)
    boxes, (result, targets) = check_load_batch(*data, *key, *options, erase_boxes, out, margin=margin)
    batch = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
    index = _samples(order, start, size)
    torch.index_select(labels, 0, index, out=targets)
    pixels = images.index_select(0, index)
    if margin and not crop_margin:
        pixels = pixels[:, :, margin:-margin, margin:-margin]
    if flip or crop_padding or crop_margin:
        draws = _draws(seed, epoch, index, images.shape[0], block=0)
        padded = F.pad(pixels, (crop_padding,) * 4) if crop_padding else pixels.contiguous()
        pixels = _crop_and_flip(padded, draws, flip, margin if crop_margin else crop_padding)
    _normalize(pixels, mean, inv_std, batch)
    if boxes is not None:
        _erase(batch, _draws(seed, epoch, index, images.shape[0], block=1), erase_probability, boxes)
    return batch if batch is result else result.copy_(batch), targets


@lru_cache(maxsize=8)
def make_erase_boxes(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """A fixed table of boxes (h, w) to erase from images of `height` x `width` pixels: int32 [4096, 2].

    Distributed as those of torchvision.transforms.RandomErasing with its defaults (Zhong et al. 2017): the area is
    uniform in 2 % .. 33 % of the image, the aspect ratio log-uniform in 0.3 .. 3.3, and up to ten tries are made
    until both sides are smaller than the image's; where all fail the box is (0, 0), which erases nothing. The draws
    are Philox output with seed 0 (float64 arithmetic on the CPU), so the table is the same everywhere.
    """
    rows = torch.arange(ERASE_BOXES)
    boxes = np.zeros((ERASE_BOXES, 2), dtype=np.int32)
    missing = np.ones(ERASE_BOXES, dtype=bool)
    low, high = np.log(_ERASE_RATIO)
    for attempt in range(_ERASE_TRIES):
        draws = keyed_uniform(0, Purpose.AUGMENT, rows, attempt, _TABLE_BLOCK).double().numpy()
        area = height * width * (_ERASE_SCALE[0] + (_ERASE_SCALE[1] - _ERASE_SCALE[0]) * draws[:, 0])
        ratio = np.exp(low + (high - low) * draws[:, 1])
        sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=1))).astype(np.int32)
        fits = missing & (sides[:, 0] < height) & (sides[:, 1] < width)
        boxes[fits] = sides[fits]
        missing &= ~fits
    return torch.from_numpy(boxes).to(device)


def sides_of(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels of images whose size is one number, for squares, or two.

    Raises:
        ValueError: anything else, or a side that is not positive.
    """
    given: Any = image_size
    sides = [given] if isinstance(given, Integral) else list(given)
    if len(sides) not in (1, 2) or not all(isinstance(side, Integral) and int(side) >= 1 for side in sides):
        shown = sides[0] if len(sides) == 1 else tuple(sides)
        raise ValueError(f"image_size is a positive integer, or two of them (height and width), got {shown}")
    return int(sides[0]), int(sides[-1])


def check_load_batch(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    start: Tensor,
    size: int,
    mean: Tensor,
    inv_std: Tensor,
    epoch: Tensor,
    crop_padding: int,
    erase_probability: float,
    erase_boxes: Tensor | None,
    out: tuple[Tensor, Tensor] | None,
    margin: int = 0,
) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """The checks that every backend's `load_batch` makes.

    Returns:
        The boxes to erase with (None where nothing is erased), and the buffers to write into, made if `out` is None.
    """
    if images.dim() != 4 or images.dtype != torch.uint8 or not images.is_contiguous():
        raise ValueError(
            f"images must be contiguous uint8 [N, C, H, W], got {_describe(images)}; make them with "
            "torch.uint8 and .contiguous()"
        )
    device = images.device
    count, channels, height, width = images.shape
    _expect("labels", labels, torch.int64, (count,), device)
    _expect("order", order, torch.int64, (order.numel(),), device)
    _expect("start", start, torch.int64, (), device)
    _expect("epoch", epoch, torch.int64, (), device)
    _expect("mean", mean, torch.float32, (channels,), device)
    _expect("inv_std", inv_std, torch.float32, (channels,), device)
    if not 1 <= size <= order.shape[0]:
        raise ValueError(f"size must be in 1 .. {order.shape[0]}, the length of order, got {size}")
    height, width = height - 2 * margin, width - 2 * margin
    if margin < 0 or height < 1 or width < 1:
        raise ValueError(f"margin must be at least 0 pixels and leave some of {list(images.shape[2:])}, got {margin}")
    if crop_padding < 0:
        raise ValueError(f"crop_padding must be at least 0 pixels, got {crop_padding}")
    if not 0.0 <= erase_probability <= 1.0:
        raise ValueError(f"erase_probability must be in 0 .. 1, got {erase_probability}")
    boxes = None
    if erase_probability > 0:
        if erase_boxes is None:
            raise ValueError("erase_probability > 0 needs erase_boxes; make them with make_erase_boxes(H, W, device)")
        _expect("erase_boxes", erase_boxes, torch.int32, (ERASE_BOXES, 2), device)
        boxes = erase_boxes
    shape = (size, channels, height, width)
    if out is None:
        batch = torch.empty(shape, dtype=torch.float32, device=device, memory_format=torch.channels_last)
        return boxes, (batch, torch.empty(size, dtype=torch.int64, device=device))
    batch, targets = out
    _expect("out[1]", targets, torch.int64, (size,), device)
    if (
        batch.shape != shape
        or batch.dtype not in (torch.float32, torch.bfloat16)
        or batch.device != device
        or not batch.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"out[0] must be float32 or bfloat16 {shape} on {device} in channels-last memory format, got "
            f"{_describe(batch)} with strides {batch.stride()}"
        )
    return boxes, (batch, targets)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)} on {device}, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else " (not contiguous)"
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{layout}"


def _samples(order: Tensor, start: Tensor, size: int) -> Tensor:
    """order[start : start + size] without a wait on a device, and without a copy on the CPU."""
    if order.is_cpu:
        first = int(start)
        if not 0 <= first <= order.shape[0] - size:
            raise ValueError(
                f"start {first} with size {size} leaves the order of {order.shape[0]} samples; "
                f"the last valid start is {order.shape[0] - size}"
            )
        return order.narrow(0, first, size)
    return order.index_select(0, start + torch.arange(size, device=order.device))


def _draws(seed: int, epoch: Tensor, index: Tensor, num_images: int, block: int) -> Tensor:
    """The block's four uniforms for every sample: [B, 4]."""
    if index.is_cpu:
        return _draws_of_epoch(seed, int(epoch), num_images, block).index_select(0, index)
    return keyed_uniform(seed, Purpose.AUGMENT, index, epoch, block)


@lru_cache(maxsize=4)
def _draws_of_epoch(seed: int, epoch: int, num_images: int, block: int) -> Tensor:
    """All samples' uniforms, [N, 4]. Philox is a hundred small operations, about 0.3 ms for a micro-batch of 64 on a
    CPU: as long as the rest of the input operation together. Once per epoch it costs a few milliseconds."""
    return keyed_uniform(seed, Purpose.AUGMENT, torch.arange(num_images), epoch, block)


def _crop_and_flip(padded: Tensor, draws: Tensor, flip: bool, slack: int) -> Tensor:
    """Random crop of images [B, C, H, W] that are larger by `slack` pixels on every side, then the random flip: uint8
    [B, C, H - 2 slack, W - 2 slack].

    A view with overlapping elements, one window for every possible first pixel, turns all crops into one index_select
    that copies whole rows; a flipped image is taken from a mirrored copy, its window mirrored as well.
    """
    batch, channels, row_count, row = padded.shape
    height, width = row_count - 2 * slack, row - 2 * slack
    top, left = ((draws[:, 1:3] * (2 * slack + 1)).long()).unbind(1)
    image = torch.arange(batch, device=padded.device)
    if flip:
        flipped = draws[:, 0] < 0.5
        padded = torch.cat([padded, padded.flip(3)])
        image = image + batch * flipped
        left = torch.where(flipped, 2 * slack - left, left)
    plane = row * row_count
    count = padded.numel() - (channels - 1) * plane - (height - 1) * row - (width - 1)
    windows = padded.as_strided((count, channels, height, width), (1, plane, row, 1))
    return windows.index_select(0, image * (channels * plane) + top * row + left)


def _normalize(pixels: Tensor, mean: Tensor, inv_std: Tensor, batch: Tensor) -> None:
    """batch = (pixels - mean) * inv_std, from uint8 planes to float32 channels-last."""
    if pixels.is_cpu:
        # A strided copy per channel: one transposing copy, with inner loops over 3 channels, takes 3.5 times as long.
        for channel in range(pixels.shape[1]):
            batch[:, channel].copy_(pixels[:, channel])
    else:
        batch.copy_(pixels)
    # In memory an image is H W repetitions of C values. Tiling the statistics likewise makes both passes run over
    # contiguous rows; broadcasting them over channels-last takes eight times as long on a CPU.
    repeats = pixels.shape[2] * pixels.shape[3]
    rows = batch.permute(0, 2, 3, 1).view(pixels.shape[0], -1)
    rows.sub_(mean.repeat(repeats)).mul_(inv_std.repeat(repeats))


def _erase(batch: Tensor, draws: Tensor, probability: float, boxes: Tensor) -> None:
    """Sets each erased sample's box to 0.0."""
    size, channels, height, width = batch.shape
    sides = boxes.index_select(0, (draws[:, 1] * ERASE_BOXES).long())
    # A sample that keeps its pixels gets a box of no rows.
    box_height = torch.where(draws[:, 0] < probability, sides[:, 0], 0)
    top = (draws[:, 2] * (height - sides[:, 0] + 1)).long()
    left = (draws[:, 3] * (width - sides[:, 1] + 1)).long()
    row = torch.arange(height, device=batch.device)
    column = torch.arange(width * channels, device=batch.device).div(channels, rounding_mode="floor")
    in_rows = (row >= top[:, None]) & (row < (top + box_height)[:, None])
    in_columns = (column >= left[:, None]) & (column < (left + sides[:, 1])[:, None])
    pixels = batch.permute(0, 2, 3, 1).view(size, height, width * channels)
    pixels.masked_fill_(in_rows[:, :, None] & in_columns[:, None, :], 0.0)
