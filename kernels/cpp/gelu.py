"""GELU by the exact normal distribution, SiLU, and back, over the C++ kernels.

Where a backend does not say `Abilities.gelu` or `Abilities.silu`, the local step takes the library's operations."""

from collections.abc import Callable

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["gelu_backward", "gelu_forward", "silu_forward"]

_ROWS = 64  # as gelu.cpp has it


def gelu_forward(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """(x Phi(x), its derivative), both like `x`, with Phi the normal distribution function.

    Args:
        x: float32 or bfloat16, dense, of any shape.
        in_place: the derivative takes its place.
    """
    return _forward(load_kernels().unlocked_gelu_forward, x, in_place=in_place)


def silu_forward(x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """As `gelu_forward`, of x / (1 + e^-x); `gelu_backward` is the way back of either."""
    return _forward(load_kernels().unlocked_silu_forward, x, in_place=in_place)


def _forward(function: Callable[..., None], x: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
    y, slope = torch.empty_like(x), x if in_place else torch.empty_like(x)
    half = int(x.dtype == torch.bfloat16)
    function(half, x.data_ptr(), x.numel(), y.data_ptr(), slope.data_ptr(), torch.get_num_threads())
    return y, slope


def gelu_backward(grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """(grad * slope, in the place of `slope`; its sums over all but the last dimension, [D] float32).

    Args:
        grad: [..., D], like `slope`; of [B, T, D] a view of [B, 1, D] may be read as it is.
        slope: contiguous.
    """
    repeats = grad.shape[1] if grad.dim() == 3 and grad.stride(1) == 0 else 1
    grad = grad[:, 0].contiguous() if repeats > 1 else grad.contiguous()
    columns = slope.shape[-1]
    rows = slope.numel() // columns
    sums = torch.empty(columns)
    scratch = torch.empty(-(-rows // _ROWS) * columns)
    load_kernels().unlocked_gelu_backward(
        int(slope.dtype == torch.bfloat16),
        grad.data_ptr(),
        slope.data_ptr(),
        rows,
        columns,
        repeats,
        slope.data_ptr(),
        sums.data_ptr(),
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return slope, sums
