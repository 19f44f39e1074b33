"""The reference's BatchNorm + LeakyReLU + pooling against torch.nn layers and autograd in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import (
    NormActResult,
    PoolKind,
    norm_act_backward,
    norm_act_backward_full,
    norm_act_forward,
)

# Shape, latent_size, pool, pool_size.
CASES: list[tuple[tuple[int, ...], int, PoolKind, int]] = [
    ((3, 4, 8, 8), 4, "none", 1),
    ((3, 4, 8, 8), 2, "max", 1),
    ((3, 4, 8, 8), 2, "average", 2),
    ((3, 4, 8, 8), 4, "average", 1),
    ((3, 4, 6, 9), 3, "max", 1),  # windows of 2 x 3: a max window lies across two of them
    ((3, 4, 7, 5), 1, "max", 1),  # odd: the last row and column are dropped
    ((3, 4, 7, 5), 0, "max", 1),
    ((2, 3, 5, 4), 0, "none", 1),
    ((1, 3, 4, 4), 2, "max", 1),
    ((6, 5), 5, "none", 1),
    ((6, 5), 0, "none", 1),
]
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3


class _Truth(nn.Module):
    """The composition of library layers, in float64."""

    def __init__(self, conv: Tensor) -> None:
        super().__init__()
        channels = conv.shape[1]
        norm = nn.BatchNorm2d if conv.dim() == 4 else nn.BatchNorm1d
        self.norm = norm(channels, eps=EPS, momentum=MOMENTUM, dtype=torch.float64)
        with torch.no_grad():
            for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
                tensor.copy_(torch.randn(channels))
            self.norm.running_var.copy_(torch.rand(channels) + 0.5)

    def forward(self, conv: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(conv), SLOPE)


def _reference(
    truth: _Truth, conv: Tensor, conv_bias: Tensor | None, **options: Any
) -> tuple[NormActResult, Tensor, Tensor]:
    """Runs the reference on copies of the truth's state; returns (result, running_mean, running_var)."""
    mean, var = truth.norm.running_mean.clone(), truth.norm.running_var.clone()
    result = norm_act_forward(
        conv, truth.norm.weight.detach(), truth.norm.bias.detach(), mean, var, conv_bias,
        momentum=MOMENTUM, eps=EPS, negative_slope=SLOPE, **options,
    )  # fmt: skip
    return result, mean, var


def _expected_output(activations: Tensor, pool: PoolKind, pool_size: int) -> Tensor:
    if pool == "max":
        return F.max_pool2d(activations, 2)
    return F.adaptive_avg_pool2d(activations, pool_size) if pool == "average" else activations


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), CASES)
def test_forward_equals_library_layers(
    shape: tuple[int, ...], latent_size: int, pool: PoolKind, pool_size: int, with_bias: bool
) -> None:
    torch.manual_seed(0)
    conv = torch.randn(shape, dtype=torch.float64) * 2 + 1
    conv_bias = torch.randn(shape[1], dtype=torch.float64) if with_bias else None
    truth = _Truth(conv)
    result, mean, var = _reference(truth, conv, conv_bias, latent_size=latent_size, pool=pool, pool_size=pool_size)
    # BatchNorm of the convolution's output with its bias: the same activations, another running mean.
    biased = conv if conv_bias is None else conv + conv_bias.reshape(1, -1, *[1] * (conv.dim() - 2))
    activations = truth(biased).detach()
    torch.testing.assert_close(result.output, _expected_output(activations, pool, pool_size))
    torch.testing.assert_close(mean, truth.norm.running_mean)
    torch.testing.assert_close(var, truth.norm.running_var)
    if latent_size == 0:
        assert result.latents.numel() == result.mask_sums.numel() == result.mask_xhat_sums.numel() == 0
    elif conv.dim() == 4:
        torch.testing.assert_close(result.latents, F.adaptive_avg_pool2d(activations, latent_size).flatten(1))
    else:
        torch.testing.assert_close(result.latents, activations)


@pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), [case for case in CASES if case[1]])
def test_backward_equals_autograd_of_latents(
    shape: tuple[int, ...], latent_size: int, pool: PoolKind, pool_size: int
) -> None:
    torch.manual_seed(1)
    conv = torch.randn(shape, dtype=torch.float64) * 2 + 1
    truth = _Truth(conv)
    result, _, _ = _reference(truth, conv, None, latent_size=latent_size, pool=pool, pool_size=pool_size)
    leaf = conv.clone().requires_grad_()
    activations = truth(leaf)
    latents = F.adaptive_avg_pool2d(activations, latent_size).flatten(1) if conv.dim() == 4 else activations
    latents_grad = torch.randn_like(latents)
    latents.backward(latents_grad)
    conv_grad, weight_grad, bias_grad = norm_act_backward(
        latents_grad, conv, result.mean, result.rstd, truth.norm.weight.detach(), truth.norm.bias.detach(),
        result.mask_sums, result.mask_xhat_sums, latent_size=latent_size, negative_slope=SLOPE,
    )  # fmt: skip
    torch.testing.assert_close(conv_grad, leaf.grad)
    torch.testing.assert_close(weight_grad, truth.norm.weight.grad)
    torch.testing.assert_close(bias_grad, truth.norm.bias.grad)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 2, 3, 3), (7, 5)])
def test_backward_full_equals_autograd_of_activations(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    conv = torch.randn(shape, dtype=torch.float64) - 1
    truth = _Truth(conv)
    result, _, _ = _reference(truth, conv, None, latent_size=0)
    leaf = conv.clone().requires_grad_()
    activations = truth(leaf)
    activations_grad = torch.randn_like(activations)
    activations.backward(activations_grad)
    conv_grad, weight_grad, bias_grad = norm_act_backward_full(
        activations_grad, conv, result.mean, result.rstd, truth.norm.weight.detach(), truth.norm.bias.detach(),
        negative_slope=SLOPE,
    )  # fmt: skip
    torch.testing.assert_close(conv_grad, leaf.grad)
    torch.testing.assert_close(weight_grad, truth.norm.weight.grad)
    torch.testing.assert_close(bias_grad, truth.norm.bias.grad)


def test_output_is_written_into_a_strided_slot() -> None:
    conv = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    truth = _Truth(conv)
    slot = torch.zeros(2, 5, 2, 2, dtype=torch.float64)
    plain, _, _ = _reference(truth, conv, None, latent_size=2, pool="max")
    into, _, _ = _reference(truth, conv, None, latent_size=2, pool="max", out=slot[:, 1:4])
    assert into.output.data_ptr() == slot[:, 1:4].data_ptr()
    assert torch.equal(slot[:, 1:4], plain.output)
    assert not slot[:, 0].any()
    assert not slot[:, 4].any()


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (2, 3)])
def test_windows_that_do_not_tile_are_refused(shape: tuple[int, ...]) -> None:
    conv = torch.randn(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"does not tile|a linear block's fused latents"):
        _reference(_Truth(conv), conv, None, latent_size=4)
