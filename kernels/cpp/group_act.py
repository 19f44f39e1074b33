"""GroupNorm with the activation after it and, at a block's end, the latents, and back, over the C++ kernels.

Where a backend does not say `Abilities.groups`, the local step takes the library's operations."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["GroupActResult", "group_act_backward", "group_act_forward"]

_KINDS = {"leaky_relu": 0, "silu": 1, "gelu": 2}  # as group_act.cpp numbers them


class GroupActResult(NamedTuple):
    """What `group_act_forward` gives.

    Attributes:
        output: like the input.
        latents: [B, C p p] float32; empty where p is 0.
        mean: of each image's groups, [B, groups] float32.
        rstd: likewise 1 / sqrt(variance + eps).
    """

    output: Tensor
    latents: Tensor
    mean: Tensor
    rstd: Tensor


def group_act_forward(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: Literal["leaky_relu", "silu", "gelu"] = "leaky_relu",
    negative_slope: float = 1.0,
    latent_size: int = 0,
) -> GroupActResult:
    """f(GroupNorm(x)) and its averages over p x p windows.

    Args:
        x: [B, C, H, W], float32 or bfloat16, in channels-last memory.
        groups: into which the C channels are divided evenly.
        weight: [C] float32, contiguous, and so is `bias`.
        activation: f; GELU is that by the exact normal distribution.
        negative_slope: of the leaky ReLU; 0: a ReLU, 1: f(v) = v.
        latent_size: p, which divides H and W; 0: no latents.
    """
    batch, channels, height, width = x.shape
    out = torch.empty_like(x)
    latents = torch.empty(batch, channels * latent_size**2)
    mean, rstd = torch.empty(batch, groups), torch.empty(batch, groups)
    load_kernels().unlocked_group_act_forward(
        *(int(x.dtype == torch.bfloat16), x.data_ptr(), batch, channels, height, width, groups),
        *(weight.data_ptr(), bias.data_ptr(), eps, _KINDS[activation], negative_slope, latent_size),
        *(out.data_ptr(), latents.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
        min(torch.get_num_threads(), batch),
    )
    return GroupActResult(out, latents, mean, rstd)


def group_act_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: Literal["leaky_relu", "silu", "gelu"] = "leaky_relu",
    negative_slope: float = 1.0,
    latent_size: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at x, like it, of the weight and of the bias, [C] float32.

    Args:
        grad: at the latents, [B, C p p] float32; where p is 0 at every activation, like `x`.
        x: as `group_act_forward` took it, and so are the others.
        mean: as it gave it, and so is `rstd`.
        out: where the gradient at x goes; may be `x` itself.
    """
    batch, channels, height, width = x.shape
    out = torch.empty_like(x) if out is None else out
    grad = grad.contiguous() if latent_size else grad
    weight_grad, bias_grad = torch.empty(channels), torch.empty(channels)
    load_kernels().unlocked_group_act_backward(
        *(int(x.dtype == torch.bfloat16), grad.data_ptr(), x.data_ptr(), batch, channels, height, width),
        *(mean.shape[1], weight.data_ptr(), bias.data_ptr(), mean.data_ptr(), rstd.data_ptr()),
        *(_KINDS[activation], negative_slope, latent_size, out.data_ptr()),
        *(weight_grad.data_ptr(), bias_grad.data_ptr(), min(torch.get_num_threads(), batch)),
    )
    return out, weight_grad, bias_grad
