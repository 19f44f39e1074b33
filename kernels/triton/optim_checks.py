"""What the fused optimizers take: options, parameters and gradients, or why not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCHEDULE_FREE", "beta1_of", "check_options", "check_params", "matching_gradient"]

SCHEDULE_FREE = ("adamw_sf", "schedule_free_adamw", "schedule_free_sgd")


def beta1_of(group: Mapping[str, Any]) -> float:
    """The first beta, or the momentum."""
    return float(group["betas"][0] if "betas" in group else group["momentum"])


def check_params(params: list[Tensor]) -> None:
    """
    Raises:
        ValueError: there are none, or one is not dense float32 on the device of the others.
    """
    if not params:
        raise ValueError("the optimizer got no parameters")
    for i, p in enumerate(params):
        dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
        if p.dtype != torch.float32 or p.device != params[0].device or not dense:
            raise ValueError(
                f"parameters must be contiguous or channels-last float32 tensors on {params[0].device}; parameter {i} "
                f"is {p.dtype} {list(p.shape)} with strides {p.stride()} on {p.device}"
            )


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: an option is out of its range.
    """
    beta1 = beta1_of(options)
    beta2 = options["betas"][1] if "betas" in options else 0.0
    for name in ("lr", "eps", "weight_decay", "warmup_steps"):
        if not options.get(name, 0.0) >= 0:
            raise ValueError(f"{name} must be at least 0, got {options[name]}")
    if kind == "sgd":
        if not beta1 >= 0:
            raise ValueError(f"momentum must be at least 0, got {beta1}")
        if options["nesterov"] and beta1 == 0:
            raise ValueError("nesterov needs a momentum above 0")
    elif not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas (or momentum) must be at least 0 and below 1, got {beta1}, {beta2}")
    elif kind in SCHEDULE_FREE and beta1 == 0:
        raise ValueError(f"{kind} needs a first beta (or momentum) above 0, got 0")


def matching_gradient(grads: Sequence[Tensor | None], params: list[Tensor], i: int) -> Tensor:
    """The gradient of parameter i, copied only if its memory layout is not the parameter's.

    Raises:
        ValueError: it has another shape, type or device than it may have.
    """
    grad, param = grads[i], params[i]
    assert grad is not None
    if (grad.shape, grad.device) != (param.shape, param.device) or grad.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"the gradient of parameter {i} must be float32 or bfloat16, {list(param.shape)} on {param.device}, got "
            f"{grad.dtype} {list(grad.shape)} on {grad.device}"
        )
    if grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous()):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
