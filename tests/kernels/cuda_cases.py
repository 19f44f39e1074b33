"""What the tests of the CUDA backend share: their inputs, and how near is near enough."""

from typing import Any

import pytest
import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "EPS",
    "MOMENTUM",
    "ROUNDING",
    "SLOPE",
    "assert_near",
    "needs_gpu",
    "norm_act_inputs",
    "resident_images",
]

# What only a device can show, or what takes an emulated one too long.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = tuple(ROUNDING)
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3


def norm_act_inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, device: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]
    vectors = {name: torch.randn(channels, generator=generator) for name in ("bias", "running_mean", "conv_bias")}
    vectors["weight"] = torch.where(torch.randn(channels, generator=generator) > 0, 1.0, -1.0) + vectors["bias"] / 9
    vectors["running_var"] = torch.rand(channels, generator=generator) + 0.5
    conv = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)
    # The slope jumps at zero: values that close to it are moved away, so that float32 and float64 see the same sign.
    x = conv.double()
    dims = [0, *range(2, x.dim())]
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    scale = vectors["weight"].reshape(per_channel) / (x.var(dims, correction=0, keepdim=True) + EPS).sqrt()
    y = (x - x.mean(dims, keepdim=True)) * scale + vectors["bias"].reshape(per_channel)
    conv = torch.where(y.abs() < 1e-4, conv + 0.0625, conv)
    if channels_last and conv.dim() == 4:
        conv = conv.to(memory_format=torch.channels_last)
    return {name: tensor.to(device) for name, tensor in {"conv": conv, **vectors}.items()}


def assert_near(name: str, actual: Tensor, expected: Tensor, rounding: float, share: float) -> None:
    """|actual - expected| <= rounding * |expected| + share * (the largest |expected|), NaN where NaN is.

    Below its normal numbers, float16 has steps of 2**-24.
    """
    assert actual.shape == expected.shape, name
    expected = expected.double()
    largest = expected.nan_to_num(0.0).abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=rounding,
        atol=share * largest + (2**-25 if actual.dtype == torch.float16 else 1e-30),
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def resident_images(count: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(0, 10, (count,), generator=generator),
        "order": torch.randperm(count, generator=generator),
        "start": torch.tensor(5),
        "mean": torch.rand(shape[0], generator=generator) * 255,
        "inv_std": torch.rand(shape[0], generator=generator),
        "epoch": torch.tensor(2**32 + 7),
    }
