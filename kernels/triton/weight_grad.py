"""A convolution's weight gradient in Triton, with the way back through BatchNorm and LeakyReLU inside: the launches.

`norm_act_backward` writes the gradient at the convolution's output, which is as large as the output, only for the
library's weight gradient to read it. Here it is made again wherever a product needs it, and never written. Three
launches; results repeat bit by bit.
"""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.kernels.triton.norm_act import (
    Launch,
    check_inputs,
    check_window_tensors,
    latent_side,
    run_launches,
    shape_of,
    strides_of,
)
from unlocked.kernels.triton.norm_act_backward_kernels import window_totals_kernel
from unlocked.kernels.triton.weight_grad_geometry import Convolution, WeightGradGeometry, weight_grad_geometry
from unlocked.kernels.triton.weight_grad_kernels import weight_grad_kernel, weight_grad_sum_kernel

__all__ = ["WeightGradResult", "norm_act_weight_grad", "weight_grad_launches"]

Pair = tuple[int, int]


class WeightGradResult(NamedTuple):
    """Gradients of a convolution's kernel and of the BatchNorm after it."""

    kernel_grad: Tensor  # like the kernel: [C, C_in, kh, kw]
    weight_grad: Tensor  # [C], float32
    bias_grad: Tensor  # [C], float32


def norm_act_weight_grad(
    latents_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_sums: Tensor,
    mask_xhat_sums: Tensor,
    source: Tensor,
    kernel: Tensor,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    latent_size: int,
    negative_slope: float = 0.01,
) -> WeightGradResult:
    """What `norm_act_backward` and then the library's weight gradient give, without the gradient between them.

    Products are those of tensors as they are stored, added up in float32; of float32 tensors in tf32 where torch's
    convolutions are. The gradient between has the rounding of `conv`'s type, as if it were stored.

    Args:
        latents_grad: [B, C p p], to `mask_xhat_sums`: see `norm_act_backward`.
        conv: [B, C, H, W], the output of `source` and `kernel` without a bias.
        source: the convolution's input, [B, C_in, H_in, W_in], of the type of `conv`, any strides.
        kernel: [C, C_in, kh, kw]; only its shape, type and strides are of interest, which the result has.

    Raises:
        ValueError: as `norm_act_backward`; a convolution in groups; an input or a kernel from which `conv` can't come.
    """
    check_inputs(conv, {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias})
    convolution = _convolution(conv, source, kernel, stride, padding, dilation)
    side = latent_side(conv, latent_size)
    check_window_tensors(
        conv, side, {"latents_grad": latents_grad, "mask_sums": mask_sums, "mask_xhat_sums": mask_xhat_sums}
    )
    tf32 = conv.is_cuda and conv.dtype == torch.float32 and _convolutions_in_tf32()
    result, launches = weight_grad_launches(
        latents_grad.contiguous(), conv, mean, rstd, weight, bias, mask_sums.contiguous(), mask_xhat_sums.contiguous(),
        source, kernel, weight_grad_geometry(shape_of(conv), side, convolution, tf32=tf32), negative_slope, tf32=tf32,
    )  # fmt: skip
    run_launches(conv, launches)
    return result


def weight_grad_launches(
    grad: Tensor, conv: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, mask_sums: Tensor,
    mask_xhat_sums: Tensor, source: Tensor, kernel: Tensor, geometry: WeightGradGeometry, negative_slope: float, *,
    tf32: bool,
) -> tuple[WeightGradResult, list[Launch]]:  # fmt: skip
    """What `norm_act_weight_grad` gives and the launches that fill it, as `forward_launches`."""
    shape, g = shape_of(conv), geometry
    channels, columns = shape.channels, kernel[0].numel()
    kernel_grad = torch.empty_like(kernel)
    weight_grad, bias_grad = conv.new_empty((2, channels), dtype=torch.float32).unbind()
    totals = conv.new_empty((2, g.reduction.partials, channels), dtype=torch.float32)
    partials = conv.new_empty((g.splits, channels, columns), dtype=torch.float32)
    scale = g.constants["GRID_H"] * g.constants["GRID_W"] / (shape.height * shape.width)
    sums: tuple[Any, ...] = (
        grad, mask_sums, mask_xhat_sums, totals, g.num_windows, g.reduction.rows_per_partial, channels, scale,
    )  # fmt: skip
    product: tuple[Any, ...] = (
        grad, conv, mean, rstd, weight, bias, totals, source, partials, weight_grad, bias_grad,
        shape.rows, g.num_windows, g.num_steps, g.steps_per_split, channels, scale, negative_slope, *source.shape[2:],
        *strides_of(conv), *strides_of(source),
    )  # fmt: skip
    precision = {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": os.environ.get("TRITON_INTERPRET") == "1"}
    return WeightGradResult(kernel_grad, weight_grad, bias_grad), [
        Launch(window_totals_kernel, g.reduction.grid, g.reduction.num_warps, sums, g.reduction.constants),
        Launch(weight_grad_kernel, g.grid, g.num_warps, product, {**g.constants, **precision}),
        Launch(
            weight_grad_sum_kernel, g.sum_grid, 4,
            (partials, kernel_grad, channels * columns, g.splits, *strides_of(kernel_grad)), g.sum_constants,
        ),
    ]  # fmt: skip


def _convolutions_in_tf32() -> bool:
    return str(torch.backends.cudnn.conv.fp32_precision) == "tf32"  # type: ignore[attr-defined]


def _convolution(
    conv: Tensor, source: Tensor, kernel: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> Convolution:
    """Checked: `conv` can be the output of `source` and `kernel`."""
    given = f"conv {tuple(conv.shape)}, source {tuple(source.shape)}, kernel {tuple(kernel.shape)}"
    if conv.dim() != 4 or source.dim() != 4 or kernel.dim() != 4:
        raise ValueError(f"conv, source and kernel must have four dimensions, got {given}")
    if len({conv.dtype, source.dtype}) > 1 or len({conv.device, source.device, kernel.device}) > 1:
        types = f"{conv.dtype} on {conv.device}, {source.dtype} on {source.device}, kernel on {kernel.device}"
        raise ValueError(f"conv, its source and kernel must be of one type and device, got {types}")
    sides = tuple(
        (size + 2 * pad - spread * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, spread in zip(
            source.shape[2:], kernel.shape[2:], stride, padding, dilation, strict=True
        )
    )
    if (source.shape[0], kernel.shape[0], *sides) != tuple(conv.shape) or kernel.shape[1] != source.shape[1]:
        raise ValueError(
            f"no convolution of one group with stride {stride}, padding {padding} and dilation {dilation} has these "
            f"shapes: {given}; its output would be {(source.shape[0], kernel.shape[0], *sides)}"
        )
    channels, *size = source.shape[1:]
    return Convolution((channels, size[0], size[1]), (kernel.shape[2], kernel.shape[3]), stride, padding, dilation)
