"""2 x 2 max pooling at stride 2, and back, over the C++ kernels.

Where a backend does not say `Abilities.pools`, the local step takes the library's operations."""

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["max_pool_backward", "max_pool_forward"]


def max_pool_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest of every window [B, C, H // 2, W // 2], where it lies in it: 0 to 3, uint8, like the first).

    Args:
        x: [B, C, H, W], float32 or bfloat16, in channels-last memory.
    """
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2)
    y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    places = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
    load_kernels().unlocked_max_pool_forward(
        int(x.dtype == torch.bfloat16),
        *(x.data_ptr(), batch, height, width, channels),
        *(y.data_ptr(), places.data_ptr(), torch.get_num_threads()),
    )
    return y, places


def max_pool_backward(grad: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """The gradient at the input [B, C, height, width], from that at the result.

    Args:
        grad: [B, C, height // 2, width // 2].
        places: as `max_pool_forward` gave them.
    """
    batch, channels = grad.shape[:2]
    grad = grad.contiguous(memory_format=torch.channels_last)
    shape = (batch, channels, height, width)
    out = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)
    if height % 2 or width % 2:
        out.zero_()
    load_kernels().unlocked_max_pool_backward(
        int(grad.dtype == torch.bfloat16),
        *(grad.data_ptr(), places.data_ptr(), batch, height, width, channels),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out
