"""The reference's operations as a backend that also makes a convolution's weight gradient on the way back."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unlocked.kernels import reference
from unlocked.kernels.reference import (
    load_batch,
    local_head,
    norm_act_backward,
    norm_act_backward_full,
    norm_act_forward,
)

__all__ = [
    "ABILITIES",
    "load_batch",
    "local_head",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "norm_act_weight_grad",
    "unavailable",
]

ABILITIES = replace(reference.ABILITIES, closed_form=True, weight_gradient=40)
unavailable = reference.unavailable


def norm_act_weight_grad(
    *state: Tensor, stride: Any, padding: Any, dilation: Any, latent_size: int, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `unlocked.kernels.triton.norm_act_weight_grad`, by the library."""
    *of_norm, source, kernel = state
    conv_grad, weight_grad, bias_grad = norm_act_backward(
        *of_norm, latent_size=latent_size, negative_slope=negative_slope
    )
    sizes = torch.Size(kernel.shape)
    kernel_grad = torch.nn.grad.conv2d_weight(source, sizes, conv_grad, stride, padding, dilation)
    return kernel_grad, weight_grad, bias_grad
