"""Prints what the C++ kernels that work channel by channel give, as a hash per kernel, width and type, in JSON."""

import hashlib
import json

import torch
from torch import Tensor

from unlocked.kernels import cpp

__all__ = ["hashes"]

WIDTHS = (1, 7, 20, 24, 33, 64, 112)  # below, between and above the numbers of channels that registers hold


def hashes() -> dict[str, str]:
    """Kernel, width and type -> SHA-256 of all that the kernel returns."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for channels in WIDTHS:
            for name, tensors in _results(channels, dtype).items():
                whole = hashlib.sha256()
                for tensor in tensors:
                    whole.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
                found[f"{name}, {channels} channels, {dtype}"] = whole.hexdigest()
    return found


def _results(channels: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(channels)

    def image(side: int = 6) -> Tensor:
        values = torch.randn(3, channels, side, side, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x, other, grad = image(), image(), image()
    weight, bias = 1 + 0.5 * torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    mean, var = torch.zeros(channels), torch.ones(channels)
    norm = {
        pool: cpp.norm_act_forward(x, weight, bias, mean, var, latent_size=2, pool=pool, pool_size=3)
        for pool in ("none", "max", "average")
    }
    plain = norm["none"]
    at_latents = torch.randn(3, 4 * channels, generator=generator)
    args = (x, plain.mean, plain.rstd, weight, bias)
    backward = cpp.norm_act_backward(
        at_latents.to(dtype), *args, plain.mask_sums, plain.mask_xhat_sums, latent_size=2, negative_slope=0.1
    )
    y, latents = cpp.sum_act_forward(x, other, 2, 0.1)
    pooled, places = cpp.max_pool_forward(x)
    groups = 1 if channels % 7 else 7
    # Of a smooth activation the bits depend on whether a multiply-add is rounded once.
    grouped = {
        slope: cpp.group_act_forward(x, groups, weight, bias, negative_slope=slope, latent_size=2)
        for slope in (0.0, 1.0)
    }
    ways_back = {
        f"group_act_backward {slope} {side}": cpp.group_act_backward(
            grad if side == 0 else at_latents,
            *(x, result.mean, result.rstd, weight, bias),
            negative_slope=slope,
            latent_size=side,
        )
        for slope, result in grouped.items()
        for side in (0, 2)
    }
    return {
        **{f"group_act_forward {slope}": tuple(result) for slope, result in grouped.items()},
        **ways_back,
        **{f"norm_act_forward {pool}": tuple(result) for pool, result in norm.items()},
        "running statistics": (mean, var),
        "norm_act_backward": backward,
        "norm_act_backward_full": cpp.norm_act_backward_full(grad, *args, negative_slope=0.1),
        "sum_act": (y, latents, cpp.sum_act_backward(at_latents, y, 2, 0.1)),
        "max_pool": (pooled, places, cpp.max_pool_backward(image(3), places, 6, 6)),
    }


if __name__ == "__main__":
    print(json.dumps(hashes()))
