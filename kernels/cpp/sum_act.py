"""The sum at a residual block's end with its activation and latents, and back, over the C++ kernels.

Where a backend does not say `Abilities.sums`, the local step takes the library's operations."""

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["sum_act_backward", "sum_act_forward"]


def sum_act_forward(
    a: Tensor, b: Tensor | None, latent_size: int, negative_slope: float, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(f(a + b) with f a leaky ReLU, its averages over p x p windows [B, C p p] float32).

    Args:
        a: [B, C, H, W], float32 or bfloat16, in channels-last memory.
        b: like it; None: f(a) alone (`Abilities.lone_ends`).
        latent_size: p, which divides H and W.
        negative_slope: of f, at least 0; 1: f(x) = x.
        in_place: the result takes the place of `a`.
    """
    batch, channels, height, width = a.shape
    out = a if in_place else torch.empty_like(a)
    latents = torch.empty(batch, channels * latent_size**2)
    second = None if b is None else b.data_ptr()
    load_kernels().unlocked_sum_act_forward(
        int(a.dtype == torch.bfloat16),
        *(a.data_ptr(), second, batch, height, width, channels, latent_size, negative_slope),
        *(out.data_ptr(), latents.data_ptr(), torch.get_num_threads()),
    )
    return out, latents


def sum_act_backward(grad: Tensor, y: Tensor, latent_size: int, negative_slope: float) -> Tensor:
    """The gradient at a, which is that at b as well, like `y`, what `sum_act_forward` gave; zero counts as below it.

    Args:
        grad: at the latents, [B, C p p] float32.
    """
    batch, channels, height, width = y.shape
    out, grad = torch.empty_like(y), grad.contiguous()
    load_kernels().unlocked_sum_act_backward(
        int(y.dtype == torch.bfloat16),
        *(grad.data_ptr(), y.data_ptr(), batch, height, width, channels, latent_size, negative_slope),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out
