"""A residual block's end, sum, activation and latents, of any backend against float64 autograd."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, leaky_relu

__all__ = ["check_sum_act", "image"]


def image(shape: tuple[int, ...], seed: int, device: str = "cpu") -> Tensor:
    """Normal numbers [B, C, H, W] in channels-last memory."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last).to(device)


def check_sum_act(backend: ModuleType, shape: tuple[int, ...], p: int, slope: float, device: str = "cpu") -> None:
    """Values, latents of p x p windows and gradients; in place as elsewhere."""
    a, b = image(shape, 0, device), image(shape, 1, device)
    grad = torch.randn(shape[0], shape[1] * p * p, generator=torch.Generator().manual_seed(2)).to(device)
    truth = [x.double().requires_grad_() for x in (a, b)]
    expected = leaky_relu(truth[0] + truth[1], slope)
    latents = adaptive_avg_pool2d(expected, p).flatten(1)
    latents.backward(grad.double())
    y, found = backend.sum_act_forward(a, b, p, slope)
    assert y.stride() == a.stride()
    assert found.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.double(), latents.detach(), rtol=1e-5, atol=1e-6)
    given = backend.sum_act_backward(grad, y, p, slope)
    for x in truth:
        torch.testing.assert_close(given.double(), x.grad, rtol=1e-6, atol=1e-7)
    kept = a.clone()
    again, latents_again = backend.sum_act_forward(kept, b, p, slope, in_place=True)
    assert again is kept
    assert torch.equal(again, y)
    assert torch.equal(latents_again, found)
