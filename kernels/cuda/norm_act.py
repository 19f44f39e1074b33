"""BatchNorm + LeakyReLU + pooling and its way back: the functions of reference.py over the CUDA kernels.

Dense tensors in either memory format are read in place; anything else is first copied to channels-last. Parameters
and running statistics are float32.
"""

from ctypes import byref

import torch
from torch import Tensor

from unlocked.kernels.cuda.bindings import DTYPES, device_limits, floats, launch, pointer, require, require_cuda
from unlocked.kernels.cuda.norm_act_geometry import (
    backward_geometry,
    forward_geometries,
    full_backward_geometry,
    vector_width,
)
from unlocked.kernels.reference import NormActResult, PoolKind

__all__ = ["norm_act_backward", "norm_act_backward_full", "norm_act_forward"]

_POOLS = {"none": 0, "max": 1, "average": 2}  # Pool in norm_act_forward.cu


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
    """As `unlocked.kernels.reference.norm_act_forward`, which says what the arguments mean, in two launches (three
    where the output's pooling windows don't nest in those of the latents).

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        RuntimeError: CUDA refuses a launch, or the first call can't compile the kernels.
    """
    x, shape, channels_last = _dense(conv)
    batch, channels, height, width = shape
    for name, parameter in (
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        require(name, parameter, (channels,), torch.float32, conv)
    if conv_bias is not None:
        require("conv_bias", conv_bias, (channels,), torch.float32, conv)
    side = _grid_side(conv, latent_size) if latent_size else 0
    cell = _cell(conv, shape, pool, pool_size)
    output, copied = _output_buffer(x, (height // cell[0], width // cell[1]), channels_last, out)
    require_cuda("conv", conv)

    columns = channels * side * side
    latents = torch.empty((batch, columns) if side else (0,), dtype=x.dtype, device=x.device)
    sums = floats((2, batch, columns) if side else (2, 0), x)
    statistics = floats((2, channels), x)

    sms, _ = device_limits(x.device.index)
    vector = vector_width(channels, channels_last, x.element_size(), x.data_ptr(), output.data_ptr())
    geometry, output_geometry = forward_geometries(shape, channels_last, vector, sms, side, cell)
    partials = floats((geometry.groups, channels, 2), x)
    dtype, (mean, rstd), (mask_sums, mask_xhat_sums) = DTYPES[x.dtype], statistics.unbind(), sums.unbind()
    options = (momentum, eps, negative_slope)
    source = (x.data_ptr(), partials.data_ptr(), weight.data_ptr(), bias.data_ptr(), pointer(conv_bias))
    kept = (running_mean.data_ptr(), running_var.data_ptr(), mean.data_ptr(), rstd.data_ptr())
    window_sums = (latents.data_ptr(), mask_sums.data_ptr(), mask_xhat_sums.data_ptr()) if side else (None, None, None)

    launch("unlocked_moments", x.device, dtype, byref(geometry), x.data_ptr(), partials.data_ptr())
    if output_geometry is None:
        arguments = (*source, *kept, output.data_ptr(), *window_sums, *options)
        launch("unlocked_apply", x.device, dtype, _POOLS[pool], byref(geometry), *arguments)
    else:
        latents_only = (*source, *kept, None, *window_sums, *options)
        launch("unlocked_apply", x.device, dtype, _POOLS["none"], byref(geometry), *latents_only)
        # Without somewhere to keep the statistics, this launch leaves the running ones alone.
        output_only = (*source, None, None, None, None, output.data_ptr(), None, None, None, *options)
        launch("unlocked_apply", x.device, dtype, _POOLS[pool], byref(output_geometry), *output_only)
    if copied is not None:
        output = copied.copy_(output)
    return NormActResult(latents, output, mean, rstd, mask_sums, mask_xhat_sums)


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
    """As `unlocked.kernels.reference.norm_act_backward`, in two launches. `latents_grad` is float32 or as `conv`.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: CUDA refuses a launch.
    """
    x, shape, channels_last = _dense(conv)
    batch, channels = shape[:2]
    side = _grid_side(conv, latent_size)
    columns = channels * side * side
    _require_statistics(conv, channels, mean, rstd, weight, bias)
    require("mask_sums", mask_sums, (batch, columns), torch.float32, conv)
    require("mask_xhat_sums", mask_xhat_sums, (batch, columns), torch.float32, conv)
    latents_grad = latents_grad.contiguous()
    is_float = latents_grad.dtype == torch.float32
    require("latents_grad", latents_grad, (batch, columns), torch.float32 if is_float else conv.dtype, conv)
    require_cuda("conv", conv)

    conv_grad = torch.empty_like(x)
    grads = floats((2, channels), x)
    sms, _ = device_limits(x.device.index)
    vector = vector_width(channels, channels_last, x.element_size(), x.data_ptr())
    geometry, fold, parts = backward_geometry(shape, channels_last, vector, sms, side)
    partials = floats((geometry.groups, channels * parts, 2), x)
    weight_grad, bias_grad = grads.unbind()
    launch(
        "unlocked_backward",
        x.device,
        *(DTYPES[x.dtype], int(is_float), fold, byref(geometry), latents_grad.data_ptr(), x.data_ptr()),
        *(mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(), bias.data_ptr()),
        *(mask_sums.data_ptr(), mask_xhat_sums.data_ptr(), partials.data_ptr()),
        *(conv_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(), negative_slope),
    )
    return conv_grad, weight_grad, bias_grad


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
    """As `unlocked.kernels.reference.norm_act_backward_full`, in two launches.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: CUDA refuses a launch.
    """
    x, shape, channels_last = _dense(conv)
    channels = shape[1]
    _require_statistics(conv, channels, mean, rstd, weight, bias)
    if activations_grad.shape != conv.shape or activations_grad.dtype != conv.dtype:
        raise ValueError(
            f"activations_grad must be {conv.dtype} {list(conv.shape)} like conv, got {activations_grad.dtype} "
            f"{list(activations_grad.shape)}"
        )
    if activations_grad.device != conv.device:
        raise ValueError(f"activations_grad must be on {conv.device} like conv, it is on {activations_grad.device}")
    grad = activations_grad.contiguous(memory_format=_memory_format(x, channels_last))
    require_cuda("conv", conv)

    conv_grad = torch.empty_like(x)
    grads = floats((2, channels), x)
    sms, _ = device_limits(x.device.index)
    vector = vector_width(channels, channels_last, x.element_size(), x.data_ptr(), grad.data_ptr())
    geometry = full_backward_geometry(shape, channels_last, vector, sms)
    partials = floats((geometry.groups, channels, 2), x)
    weight_grad, bias_grad = grads.unbind()
    launch(
        "unlocked_backward_full",
        x.device,
        *(DTYPES[x.dtype], byref(geometry), grad.data_ptr(), x.data_ptr()),
        *(mean.data_ptr(), rstd.data_ptr(), weight.data_ptr(), bias.data_ptr(), partials.data_ptr()),
        *(conv_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(), negative_slope),
    )
    return conv_grad, weight_grad, bias_grad


def _dense(conv: Tensor) -> tuple[Tensor, tuple[int, int, int, int], bool]:
    """conv without gaps, its shape as [B, C, H, W], and whether channels are its innermost dimension."""
    if conv.dim() not in (2, 4) or conv.dtype not in DTYPES or conv.numel() == 0:
        raise ValueError(
            f"conv must be non-empty float32, bfloat16 or float16 [B, C, H, W] or [B, C], got {conv.dtype} "
            f"{list(conv.shape)}"
        )
    if conv.dim() == 2:
        return conv.contiguous(), (conv.shape[0], conv.shape[1], 1, 1), True
    batch, channels, height, width = conv.shape
    shape = (batch, channels, height, width)
    # A single channel is innermost in both formats; the contiguous kernels read it with all their threads.
    if channels > 1 and conv.is_contiguous(memory_format=torch.channels_last):
        return conv, shape, True
    if conv.is_contiguous():
        return conv, shape, False
    return conv.contiguous(memory_format=torch.channels_last), shape, True


def _memory_format(x: Tensor, channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last and x.dim() == 4 else torch.contiguous_format


def _output_buffer(
    x: Tensor, plane: tuple[int, int], channels_last: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where the kernels write, and where that has to be copied afterwards if `out` has another layout."""
    memory_format = _memory_format(x, channels_last)
    shape = (*x.shape[:2], *plane) if x.dim() == 4 else tuple(x.shape)
    if out is not None:
        if out.shape != shape or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"out must be {x.dtype} {list(shape)} on {x.device}, got {out.dtype} {list(out.shape)} on {out.device}"
            )
        if out.is_contiguous(memory_format=memory_format):
            return out, None
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format), out


def _grid_side(conv: Tensor, latent_size: int) -> int:
    """The side of the latents' grid: 1 for [B, C], whose latents are its activations."""
    if conv.dim() == 2:
        if latent_size != conv.shape[1]:
            raise ValueError(f"a linear block's fused latents are its {conv.shape[1]} activations, got {latent_size}")
        return 1
    height, width = conv.shape[2:]
    if latent_size < 1 or height % latent_size or width % latent_size:
        raise ValueError(f"latent pooling to {latent_size} does not tile {height} x {width} pixels")
    return latent_size


def _cell(conv: Tensor, shape: tuple[int, int, int, int], pool: str, pool_size: int) -> tuple[int, int]:
    """Pixels of one output value."""
    height, width = shape[2:]
    if pool not in _POOLS:
        raise ValueError(f"pool {pool!r} is not known; valid: {', '.join(_POOLS)}")
    if pool == "none":
        return 1, 1
    if conv.dim() == 2:
        raise ValueError(f"pool {pool!r} needs conv [B, C, H, W], got {list(conv.shape)}; use pool='none'")
    if pool == "max":
        if height < 2 or width < 2:
            raise ValueError(f"2 x 2 max pooling needs at least 2 x 2 pixels, got {height} x {width}")
        return 2, 2
    if pool_size < 1 or height % pool_size or width % pool_size:
        raise ValueError(f"average pooling to {pool_size} does not tile {height} x {width} pixels")
    return height // pool_size, width // pool_size


def _require_statistics(conv: Tensor, channels: int, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, vector in (("mean", mean), ("rstd", rstd), ("weight", weight), ("bias", bias)):
        require(name, vector, (channels,), torch.float32, conv)
