"""The input operation: `load_batch` of ../images.py over the CUDA kernel."""

import torch
from torch import Tensor

from unlocked.kernels.cuda.bindings import launch, pointer, require_cuda
from unlocked.kernels.images import check_load_batch
from unlocked.kernels.philox import Purpose

__all__ = ["load_batch"]

_MASK = 0xFFFFFFFF


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
    """As `unlocked.kernels.images.load_batch`, to the bit, in one launch. Where order[start : start + size] leaves
    the order, or an index leaves the data set, the entry's pixels are NaN and its label is -1.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        RuntimeError: CUDA refuses the launch, or the first call can't compile the kernels.
    """
    boxes, (result, targets) = check_load_batch(
        images, labels, order, start, size, mean, inv_std, epoch, crop_padding, erase_probability, erase_boxes, out
    )
    require_cuda("images", images)
    batch = result if result.dtype == torch.float32 else torch.empty_like(result, dtype=torch.float32)
    count, channels, height, width = images.shape
    low, high = seed & _MASK, (seed >> 32) & _MASK  # folded as in philox.py
    launch(
        "unlocked_load_batch",
        images.device,
        *(size, count, order.shape[0], channels, height, width),
        *(images.data_ptr(), labels.data_ptr(), order.data_ptr(), start.data_ptr(), epoch.data_ptr()),
        *(mean.data_ptr(), inv_std.data_ptr(), pointer(boxes), 0 if boxes is None else boxes.shape[0]),
        *(batch.data_ptr(), targets.data_ptr(), low ^ (high * 0x9E3779B1 & _MASK), int(Purpose.AUGMENT)),
        *(int(flip), crop_padding, erase_probability),
    )
    return batch if batch is result else result.copy_(batch), targets
