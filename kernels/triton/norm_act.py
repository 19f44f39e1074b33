"""BatchNorm + LeakyReLU + latents + pooling in Triton, forward and backward: the launches and their checks.

Launches: one where at most 1024 rows (B x H x W) are normalised, as in linear blocks; else two, a reduction over the
batch and one pass over the whole tensor (see [Note: merged statistics] in `norm_act_forward_kernels.py`). The forward
pass takes one more where the output's pooling windows don't nest in the latents' windows. Results repeat bit by bit.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlocked.kernels.reference import NormActResult, PoolKind
from unlocked.kernels.triton.norm_act_backward_kernels import backward_kernel, full_totals_kernel, window_totals_kernel
from unlocked.kernels.triton.norm_act_forward_kernels import forward_kernel, moments_kernel
from unlocked.kernels.triton.norm_act_geometry import Shape, backward_geometry, forward_geometry

__all__ = [
    "Launch",
    "backward_launches",
    "check_inputs",
    "check_window_tensors",
    "forward_launches",
    "latent_side",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "run_launches",
    "shape_of",
    "strides_of",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_ROWS = 1 << 30  # rows and windows are counted in 32 bits, with room to round up


class Launch(NamedTuple):
    """One kernel launch, as data: made from shapes alone, so that it can also be compiled ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    num_warps: int
    arguments: tuple[Any, ...]
    constants: Any


def norm_act_forward(
    conv: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    conv_bias: Tensor | None = None,
    *,
    latent_size: int,
    pool: PoolKind = "none",
    pool_size: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    out: Tensor | None = None,
) -> NormActResult:
    """Training-mode BatchNorm + LeakyReLU, latents and the next layer's input: see `kernels.reference`.

    Raises:
        ValueError: a dtype, shape or device that does not fit; windows that do not tile the plane; B x H x W >= 2**30.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    if conv_bias is not None:
        vectors["conv_bias"] = conv_bias
    check_inputs(conv, vectors)
    result, launches = forward_launches(
        conv, weight, bias, running_mean, running_var, conv_bias, latent_size, pool, pool_size, momentum, eps,
        negative_slope, out,
    )  # fmt: skip
    run_launches(conv, launches)
    return result


def norm_act_backward(
    latents_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask_sums: Tensor,
    mask_xhat_sums: Tensor,
    *,
    latent_size: int,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """(conv_grad like `conv`, weight_grad [C], bias_grad [C], both float32) from the latents' gradient [B, C p p].

    Raises:
        ValueError: as `norm_act_forward`.
    """
    check_inputs(conv, {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias})
    side = latent_side(conv, latent_size)
    check_window_tensors(
        conv, side, {"latents_grad": latents_grad, "mask_sums": mask_sums, "mask_xhat_sums": mask_xhat_sums}
    )
    sums = (mask_sums.contiguous(), mask_xhat_sums.contiguous())
    result, launches = backward_launches(
        latents_grad.contiguous(), conv, mean, rstd, weight, bias, sums, side, negative_slope
    )
    run_launches(conv, launches)
    return result


def norm_act_backward_full(
    activations_grad: Tensor,
    conv: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `norm_act_backward`, from a gradient at every activation (like `conv`, any strides)."""
    check_inputs(conv, {"mean": mean, "rstd": rstd, "weight": weight, "bias": bias})
    if activations_grad.shape != conv.shape or activations_grad.device != conv.device:
        raise ValueError(
            f"activations_grad must be {tuple(conv.shape)} on {conv.device} like conv, "
            f"got {tuple(activations_grad.shape)} on {activations_grad.device}"
        )
    result, launches = backward_launches(activations_grad, conv, mean, rstd, weight, bias, None, 0, negative_slope)
    run_launches(conv, launches)
    return result


def forward_launches(
    conv: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, conv_bias: Tensor | None,
    latent_size: int, pool: PoolKind, pool_size: int, momentum: float, eps: float, negative_slope: float,
    out: Tensor | None,
) -> tuple[NormActResult, list[Launch]]:  # fmt: skip
    """What `norm_act_forward` gives, in buffers that are still to be filled, and the launches that fill them, in order.
    The tensors are checked already; those of the device "meta" do, where only the launches are of interest.
    """
    shape = shape_of(conv)
    batch, channels = shape.batch, shape.channels
    side = latent_side(conv, latent_size)
    output = _output(conv, pool, pool_size, out)
    geometry = forward_geometry(shape, side, pool, pool_size)
    mean, rstd = conv.new_empty((2, channels), dtype=torch.float32).unbind()
    latents = conv.new_empty((batch, channels * side * side) if side else 0)
    mask_sums, mask_xhat_sums = conv.new_empty((2, *latents.shape), dtype=torch.float32).unbind()
    strides, out_strides = strides_of(conv), strides_of(output)
    launches, partials, per_partial = [], None, 1
    if geometry.reduction is not None:
        grid, num_warps, num_partials, per_partial, constants = geometry.reduction
        partials = conv.new_empty((2, num_partials, channels), dtype=torch.float32)
        arguments: tuple[Any, ...] = (conv, partials, shape.rows, per_partial, channels, *strides)
        launches.append(Launch(moments_kernel, grid, num_warps, arguments, constants))
    for grid, num_warps, num_windows, num_tiles, constants in geometry.passes:
        sums = (latents, mask_sums, mask_xhat_sums) if constants["LATENTS"] else (None, None, None)
        arguments = (
            conv, weight, bias, conv_bias, running_mean, running_var, partials, mean, rstd, *sums, output,
            shape.rows, per_partial, num_windows, num_tiles, channels, momentum, eps, negative_slope,
            *strides, *out_strides,
        )  # fmt: skip
        launches.append(Launch(forward_kernel, grid, num_warps, arguments, constants))
    return NormActResult(latents, output, mean, rstd, mask_sums, mask_xhat_sums), launches


def backward_launches(
    grad: Tensor, conv: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    sums: tuple[Tensor, Tensor] | None, side: int, negative_slope: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Launch]]:  # fmt: skip
    """What `norm_act_backward` gives and the launches that fill it, as `forward_launches`.

    Args:
        grad: [B, C side side], or, where `sums` is None and `side` 0, like `conv`: that of every activation.
        sums: the forward pass's (mask_sums, mask_xhat_sums), both [B, C side side].
    """
    shape = shape_of(conv)
    channels = shape.channels
    geometry = backward_geometry(shape, side)
    conv_grad = torch.empty_like(conv)
    weight_grad, bias_grad = conv.new_empty((2, channels), dtype=torch.float32).unbind()
    strides = (*strides_of(conv), *(strides_of(grad) if sums is None else (0, 0, 0, 0)))
    scale = side * side / (shape.height * shape.width)
    (last,) = geometry.passes
    launches, partials = [], None
    if geometry.reduction is not None:
        grid, num_warps, num_partials, per_partial, constants = geometry.reduction
        partials = conv.new_empty((2, num_partials, channels), dtype=torch.float32)
        arguments: tuple[Any, ...]
        if sums is None:
            kernel = full_totals_kernel
            counts = (shape.rows, per_partial, channels, negative_slope)
            arguments = (grad, conv, mean, rstd, weight, bias, partials, *counts, *strides)
        else:
            kernel = window_totals_kernel
            arguments = (grad, *sums, partials, last.num_windows, per_partial, channels, scale)
        launches.append(Launch(kernel, grid, num_warps, arguments, constants))
    arguments = (
        grad, conv, mean, rstd, weight, bias, *(sums or (None, None)), partials, conv_grad, weight_grad, bias_grad,
        shape.rows, last.num_windows, last.num_tiles, channels, scale, negative_slope, *strides, *strides_of(conv_grad),
    )  # fmt: skip
    launches.append(Launch(backward_kernel, last.grid, last.num_warps, arguments, last.constants))
    return (conv_grad, weight_grad, bias_grad), launches


def run_launches(conv: Tensor, launches: Iterable[Launch]) -> None:
    """On the device of `conv`, in order, on its current stream."""
    device: AbstractContextManager[Any] = torch.cuda.device(conv.device) if conv.is_cuda else nullcontext()
    with device:
        for kernel, grid, num_warps, arguments, constants in launches:
            kernel[grid](*arguments, **constants, num_warps=num_warps)


def shape_of(conv: Tensor) -> Shape:
    """Of [B, C, H, W] or [B, C]."""
    height, width = conv.shape[2:] if conv.dim() == 4 else (1, 1)
    channels_last = conv.stride(1) == 1 and conv.shape[1] > 1
    return Shape(conv.shape[0], conv.shape[1], height, width, channels_last, conv.element_size())


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Four; [B, C] is a plane of one pixel."""
    return tensor.stride() if tensor.dim() == 4 else (*tensor.stride(), 1, 1)


def check_inputs(conv: Tensor, vectors: dict[str, Tensor]) -> None:
    """Raises a ValueError unless the kernels take `conv`, and all `vectors` are [C] beside it."""
    if conv.dtype not in _DTYPES:
        raise ValueError(f"conv must be float32, bfloat16 or float16, got {conv.dtype}; kernels='torch' takes others")
    if conv.dim() not in (2, 4) or conv.numel() == 0:
        raise ValueError(f"conv must be [B, C] or [B, C, H, W] and not empty, got {tuple(conv.shape)}")
    if conv.numel() // conv.shape[1] >= _MAX_ROWS:
        raise ValueError(f"B x H x W must be below 2**30, got {tuple(conv.shape)}; use a smaller batch")
    wanted = conv.shape[1:2]
    for name, vector in vectors.items():
        if vector.shape != wanted or vector.device != conv.device or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous vector [{wanted[0]}] on {conv.device}, as conv has {wanted[0]} channels, "
                f"got {tuple(vector.shape)} on {vector.device} with strides {vector.stride()}"
            )


def check_window_tensors(conv: Tensor, side: int, tensors: dict[str, Tensor]) -> None:
    """Raises a ValueError unless all are [B, C side side] where `conv` is, and `side` is not 0."""
    if side == 0:
        raise ValueError("latent_size 0 has no latents' gradient; call norm_act_backward_full")
    wanted = (conv.shape[0], conv.shape[1] * side * side)
    for name, given in tensors.items():
        if given.shape != wanted or given.device != conv.device:
            raise ValueError(f"{name} must be {wanted} on {conv.device}, got {tuple(given.shape)} on {given.device}")


def latent_side(conv: Tensor, latent_size: int) -> int:
    """The side of the latents' grid; 0: no latents. [B, C] is a plane of one pixel."""
    if conv.dim() == 2:
        if latent_size not in (0, conv.shape[1]):
            raise ValueError(
                f"a linear block's fused latents are its {conv.shape[1]} activations (or none: 0), got {latent_size}"
            )
        return min(latent_size, 1)
    height, width = conv.shape[2:]
    if latent_size < 0 or (latent_size and (height % latent_size or width % latent_size)):
        raise ValueError(
            f"latent pooling to {latent_size} does not tile {height} x {width} pixels; valid: 0 (no latents) or a "
            "divisor of both"
        )
    return latent_size


def _output(conv: Tensor, pool: PoolKind, pool_size: int, out: Tensor | None) -> Tensor:
    """`out`, checked, or a new tensor in the memory format of `conv`."""
    shape: tuple[int, ...] = tuple(conv.shape)
    if pool == "max" and conv.dim() == 4 and min(shape[2:]) >= 2:
        shape = (*shape[:2], shape[2] // 2, shape[3] // 2)
    elif pool == "average" and conv.dim() == 4:
        if pool_size < 1 or shape[2] % pool_size or shape[3] % pool_size:
            raise ValueError(f"average pooling to {pool_size} does not tile {shape[2]} x {shape[3]} pixels")
        shape = (*shape[:2], pool_size, pool_size)
    elif pool != "none":
        raise ValueError(f"pool must be none, max or average (the last two for planes of 2 x 2 or more), got {pool!r}")
    if out is None:
        channels_last = conv.dim() == 4 and conv.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=conv.dtype, device=conv.device, memory_format=memory_format)
    if out.shape != shape or out.dtype != conv.dtype or out.device != conv.device:
        raise ValueError(
            f"out must be {shape}, {conv.dtype} on {conv.device}, got {tuple(out.shape)}, {out.dtype} on {out.device}"
        )
    return out
