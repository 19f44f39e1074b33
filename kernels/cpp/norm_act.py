"""BatchNorm + LeakyReLU + pooling and its way back: the functions of reference.py over the C++ kernels, float32 or
bfloat16 in channels-last memory (and [B, C]); everything else goes to the reference."""

import torch
from torch import Tensor

from unlocked.kernels import reference
from unlocked.kernels.cpp.bindings import load_kernels
from unlocked.kernels.reference import NormActResult, PoolKind

__all__ = ["norm_act_backward", "norm_act_backward_full", "norm_act_forward"]

_POOLS = {"none": 0, "max": 1, "average": 2}  # as norm_act.cpp numbers them


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
    """See `kernels.reference.norm_act_forward`: two passes over `conv`, one for the statistics, one for the rest."""
    shape = _shape(conv, latent_size)
    fits = shape is not None and _pools(shape, pool, pool_size)
    fits = fits and _are_vectors(weight, bias, running_mean, running_var, conv_bias)
    fits = fits and (out is None or out.dtype == conv.dtype)
    if shape is None or not fits:
        return reference.norm_act_forward(
            conv,
            weight,
            bias,
            running_mean,
            running_var,
            conv_bias,
            latent_size=latent_size,
            pool=pool,
            pool_size=pool_size,
            momentum=momentum,
            eps=eps,
            negative_slope=negative_slope,
            out=out,
        )
    batch, channels, height, width, side = shape
    threads = min(torch.get_num_threads(), batch)
    cells = channels * side * side
    mean, rstd = _floats(channels), _floats(channels)
    of_latents = (batch, cells) if side else (0,)
    latents, mask_sums, mask_xhat_sums = conv.new_empty(of_latents), _floats(*of_latents), _floats(*of_latents)
    scratch = _floats(max(2 * batch * channels, threads * (height * width * channels + 3 * cells)))
    if out is None:
        out = _output_like(conv, pool, pool_size)
    strides = (out.stride(0), out.stride(1), *(out.stride()[2:] if out.dim() == 4 else (0, 0)))
    compiled = load_kernels()
    dims = (batch, channels, height, width)
    half = int(conv.dtype == torch.bfloat16)
    compiled.unlocked_batch_statistics(
        half,
        conv.data_ptr(),
        *dims,
        None if conv_bias is None else conv_bias.data_ptr(),
        running_mean.data_ptr(),
        running_var.data_ptr(),
        momentum,
        eps,
        mean.data_ptr(),
        rstd.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
    compiled.unlocked_norm_act_forward(
        half,
        conv.data_ptr(),
        *dims,
        *map(Tensor.data_ptr, (mean, rstd, weight, bias)),
        negative_slope,
        side,
        _POOLS[pool],
        pool_size,
        *map(Tensor.data_ptr, (latents, mask_sums, mask_xhat_sums, out)),
        *strides,
        scratch.data_ptr(),
        threads,
    )
    return NormActResult(latents, out, mean, rstd, mask_sums, mask_xhat_sums)


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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.reference.norm_act_backward`: one pass."""
    shape = _shape(conv, latent_size)
    alike = latents_grad.dtype == conv.dtype and (out is None or out.stride() == conv.stride())
    if shape is None or not latent_size or not alike or not _are_vectors(mean, rstd, weight, bias):
        return reference.norm_act_backward(
            latents_grad,
            conv,
            mean,
            rstd,
            weight,
            bias,
            mask_sums,
            mask_xhat_sums,
            latent_size=latent_size,
            negative_slope=negative_slope,
            out=out,
        )
    batch, channels, height, width, side = shape
    threads = min(torch.get_num_threads(), batch)
    conv_grad = torch.empty_like(conv) if out is None else out
    weight_grad, bias_grad = torch.empty_like(mean), torch.empty_like(mean)
    scratch = _floats(threads * side * side * channels)
    load_kernels().unlocked_norm_act_backward(
        int(conv.dtype == torch.bfloat16),
        latents_grad.contiguous().data_ptr(),
        conv.data_ptr(),
        batch,
        channels,
        height,
        width,
        *map(Tensor.data_ptr, (mean, rstd, weight, bias, mask_sums, mask_xhat_sums)),
        negative_slope,
        side,
        *map(Tensor.data_ptr, (conv_grad, weight_grad, bias_grad, scratch)),
        threads,
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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.reference.norm_act_backward_full`: one reduction, one pass."""
    shape = _shape(conv, 0)
    alike = activations_grad.stride() == conv.stride() and (out is None or out.stride() == conv.stride())
    alike = alike and activations_grad.dtype == conv.dtype
    if shape is None or not alike or not _are_vectors(mean, rstd, weight, bias):
        return reference.norm_act_backward_full(
            activations_grad, conv, mean, rstd, weight, bias, negative_slope=negative_slope, out=out
        )
    batch, channels, height, width, _ = shape
    conv_grad = torch.empty_like(conv) if out is None else out
    weight_grad, bias_grad = torch.empty_like(mean), torch.empty_like(mean)
    scratch = _floats(2 * batch * channels)
    load_kernels().unlocked_norm_act_backward_full(
        int(conv.dtype == torch.bfloat16),
        activations_grad.data_ptr(),
        conv.data_ptr(),
        batch,
        channels,
        height,
        width,
        *map(Tensor.data_ptr, (mean, rstd, weight, bias)),
        negative_slope,
        *map(Tensor.data_ptr, (conv_grad, weight_grad, bias_grad, scratch)),
        min(torch.get_num_threads(), batch),
    )
    return conv_grad, weight_grad, bias_grad


def _shape(conv: Tensor, side: int) -> tuple[int, int, int, int, int] | None:
    """(B, C, H, W, p) where the compiled kernels can take `conv`, else None."""
    if conv.dtype not in (torch.float32, torch.bfloat16):
        return None
    if conv.dim() == 2:
        fits = conv.is_contiguous() and side in (0, conv.shape[1])
        return (*conv.shape, 1, 1, 1 if side else 0) if fits else None
    batch, channels, height, width = conv.shape
    if not conv.is_contiguous(memory_format=torch.channels_last) or (side and (height % side or width % side)):
        return None
    return batch, channels, height, width, side


def _pools(shape: tuple[int, int, int, int, int], pool: str, size: int) -> bool:
    _, _, height, width, _ = shape
    if pool == "average":
        return height % size == 0 and width % size == 0
    return pool == "none" or (height >= 2 and width >= 2)


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _are_vectors(*given: Tensor | None) -> bool:
    """As the kernels read them, which know of no strides."""
    return all(one is None or (one.dtype == torch.float32 and one.is_contiguous()) for one in given)


def _output_like(conv: Tensor, pool: str, pool_size: int) -> Tensor:
    if conv.dim() == 2 or pool == "none":
        return torch.empty_like(conv)
    batch, channels, height, width = conv.shape
    side_h, side_w = (height // 2, width // 2) if pool == "max" else (pool_size, pool_size)
    return conv.new_empty(batch, side_h, side_w, channels).permute(0, 3, 1, 2)
