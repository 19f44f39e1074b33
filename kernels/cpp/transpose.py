"""Copies of [B, C, L] whose channels or positions lie together, from the other, over a C++ kernel.

The library copies a transposed tensor element by element; this one in blocks that stay in a core's first cache."""

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["transposed"]

_HALF = {torch.float32: 0, torch.bfloat16: 1}


def transposed(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x` [B, M, N] as [B, N, M], contiguous, or in `out`. Other types, and what is not contiguous of the two, go to
    the library."""
    batch, rows, columns = x.shape
    result = x.new_empty(batch, columns, rows) if out is None else out
    fits = x.dtype in _HALF and x.dtype == result.dtype and x.is_contiguous() and result.is_contiguous()
    if not fits or x.device.type != "cpu":
        return result.copy_(x.transpose(1, 2))
    threads = torch.get_num_threads() if x.numel() > 1 << 14 else 1
    load_kernels().unlocked_transpose(_HALF[x.dtype], x.data_ptr(), batch, rows, columns, result.data_ptr(), threads)
    return result
