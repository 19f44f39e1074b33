"""What the tests of the joined weight gradient share: layers, and the gradients that float64 autograd finds of them.

Tolerances: a float32 sum over the pixels of a batch is off by a few units in the last place of its largest terms; in
bfloat16 and float16 the factors of each product are rounded once (twice where Triton's interpreter, which truncates,
does).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels import reference

__all__ = ["CASES", "OFF", "PADDED", "SLOPE", "Case", "Layer", "check", "layer_of"]

SLOPE, EPS = 0.2, 1e-3
OFF = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


class Case(NamedTuple):
    """[B, C_in, H, W] -> C channels by a `kernel` with `options`, seen by `latent_size` windows."""

    source: tuple[int, int, int, int]
    channels: int
    kernel: tuple[int, int]
    latent_size: int
    options: dict[str, Any]


PADDED = {"padding": (1, 1)}
CASES = {
    "three colours": Case((3, 3, 8, 8), 7, (3, 3), 2, PADDED),
    "whole vectors": Case((2, 4, 8, 8), 8, (3, 3), 4, PADDED),
    "one pixel": Case((3, 5, 4, 4), 6, (1, 1), 2, {}),
    "a pixel per window": Case((3, 2, 4, 4), 3, (3, 3), 4, PADDED),
    "windows of nine": Case((2, 3, 6, 6), 5, (3, 3), 2, PADDED),
    "window of several steps": Case((2, 2, 8, 10), 3, (3, 3), 1, PADDED),
    "tiles of columns": Case((2, 9, 4, 4), 5, (3, 3), 2, PADDED),
    "tiles of channels": Case((2, 2, 4, 4), 70, (3, 3), 2, PADDED),
    "wide kernel": Case((2, 2, 12, 18), 3, (3, 5), 2, {"stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)}),
    "no padding": Case((2, 3, 6, 6), 4, (3, 3), 2, {}),
    "one of all": Case((1, 1, 3, 3), 1, (3, 3), 1, PADDED),
}


class Layer(NamedTuple):
    """What the kernels get, and the gradients that float64 autograd finds."""

    arguments: tuple[Tensor, ...]
    truth: tuple[Tensor, Tensor, Tensor]


def layer_of(case: Case, device: str, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> Layer:
    generator = torch.Generator().manual_seed(sum(case.source) + case.channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    source = (normal(*case.source) + 0.5).to(dtype).contiguous(memory_format=layout)
    kernel = normal(case.channels, case.source[1], *case.kernel).to(dtype).contiguous(memory_format=layout)
    conv = F.conv2d(source.double(), kernel.double(), **case.options).to(dtype).contiguous(memory_format=layout)
    weight, bias = normal(case.channels), normal(case.channels)
    bias = _away_from_the_kink(conv.double(), weight, bias)
    grad = normal(case.source[0], case.channels * case.latent_size**2).to(dtype)

    leaves = [t.double().requires_grad_() for t in (kernel, weight, bias)]
    exact = F.conv2d(source.double(), leaves[0], **case.options)
    if dtype != torch.float32:  # what is stored is rounded; its gradient passes as it is
        exact = exact + (conv.double() - exact).detach()
    y = F.leaky_relu(F.batch_norm(exact, None, None, *leaves[1:], training=True, eps=EPS), SLOPE)
    F.adaptive_avg_pool2d(y, case.latent_size).flatten(1).backward(grad.double())
    truth = tuple(leaf.grad for leaf in leaves)

    zeros = torch.zeros(2, case.channels, dtype=torch.float64)
    found = reference.norm_act_forward(
        conv.double(), weight, bias, *zeros, latent_size=case.latent_size, negative_slope=SLOPE, eps=EPS
    )
    vectors = [t.float() for t in (found.mean, found.rstd, weight, bias, found.mask_sums, found.mask_xhat_sums)]
    return Layer(tuple(t.to(device) for t in (grad, conv, *vectors, source, kernel)), truth)  # type: ignore[arg-type]


def _away_from_the_kink(conv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Moves the bias until no value is so near to LeakyReLU's kink that rounding could put it on the other side."""
    var, mean = torch.var_mean(conv, (0, 2, 3), correction=0, keepdim=True)
    scaled = (conv - mean) * (var + EPS).rsqrt() * weight.reshape(mean.shape)
    for _ in range(50):
        near = (scaled + bias.reshape(mean.shape)).abs().amin((0, 2, 3)) < 1e-5
        bias = torch.where(near, bias + 1e-3, bias)
    return bias


def check(found: Sequence[Tensor], layer: Layer, off: float) -> None:
    """(kernel_grad, weight_grad, bias_grad) within `off` of the largest that autograd finds."""
    kernel = layer.arguments[-1]
    assert found[0].dtype == kernel.dtype
    assert found[0].stride() == kernel.stride()
    for name, actual, expected in zip(("kernel", "weight", "bias"), found, layer.truth, strict=True):
        assert actual.shape == expected.shape
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            actual.double().cpu(), expected, rtol=0.0, atol=off * scale, msg=lambda text, name=name: f"{name}: {text}"
        )
