"""What leaves a layer: in the memory format of an edge; and how often scores are right."""

import torch
from torch import Tensor

from unlocked.kernels.reference import label_ranks

__all__ = ["as_delivered", "count_correct"]


def as_delivered(output: Tensor) -> Tensor:
    """`output` in the memory format in which an edge would deliver it: channels last for [B, C, H, W], else contiguous.

    Whoever computes the next layer then reads the same strides, and libraries choose the same kernels, wherever the
    stages are cut: any block may return a view, a transposed tensor, or images in plain order.
    """
    strides = _contiguous_strides(output.shape)
    if output.dim() == 4:
        _, channels, height, width = output.shape
        strides = (channels * height * width, 1, width * channels, channels)
    if output.stride() == strides:
        return output
    # The same bytes where only sizes of 1 have other strides; a copy elsewhere.
    form = torch.channels_last if output.dim() == 4 else torch.contiguous_format
    return output.contiguous(memory_format=form).as_strided(output.shape, strides)


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many rows have their label first, and among the first five: float64 [2], on the device."""
    rank = label_ranks(logits, labels)
    return torch.stack([(rank < 1).sum(), (rank < 5).sum()]).double()
