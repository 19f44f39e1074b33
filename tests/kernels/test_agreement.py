"""Cross-entropy and agreement in pieces: the value and the gradients of float64 autograd on whole scores."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels import vocabulary
from unlocked.kernels.vocabulary import Before, linear_loss


def whole(own: Tensor, before: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """Of scores [N, V], term by term."""
    counts = targets != -100
    p, q = own[counts].softmax(1), before[counts].softmax(1)
    task = -p.gather(1, targets[counts][:, None]).log().mean()
    return alpha * task + (1 - alpha) * (p * (p / q).log()).sum(1).mean()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    latents, before = torch.randn(13, 5, dtype=dtype), torch.randn(13, 5, dtype=dtype)
    weight, bias = torch.randn(11, 5, dtype=dtype), torch.randn(11, dtype=dtype)
    targets = torch.randint(11, (13,))
    targets[[0, 7]] = -100
    return latents, before, weight, bias, targets


@pytest.mark.parametrize("alpha", [1.0, 0.7, 0.1])
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_loss_and_its_gradient(monkeypatch: pytest.MonkeyPatch, alpha: float, rows: int, with_bias: bool) -> None:
    monkeypatch.setattr(vocabulary, "PIECE", 11 * rows)
    latents, before, weight, bias, targets = inputs(torch.float64)
    offset = bias if with_bias else None
    latents.requires_grad_()
    expected = whole(F.linear(latents, weight, offset), F.linear(before, weight, offset), targets, alpha)
    (wanted,) = torch.autograd.grad(expected, latents)
    found = linear_loss(latents, weight, offset, targets, -100, None, before=Before(before, weight, offset, alpha))
    (gradient,) = torch.autograd.grad(3 * found, latents)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, 3 * wanted)
    scores = F.linear(latents, weight, offset).detach().requires_grad_()
    expected = whole(scores, F.linear(before, weight, offset), targets, alpha)
    (wanted,) = torch.autograd.grad(expected, scores)
    kept = scores.detach().clone()
    found = linear_loss(scores, None, None, targets, -100, None, before=Before(before, weight, offset, alpha))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores)[0], wanted)
    assert torch.equal(scores, kept)
    other = Before(F.linear(before, weight, offset), None, None, alpha)  # both layers' scores are there
    found = linear_loss(latents, weight, offset, targets, -100, None, before=other, known=scores.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(3 * torch.autograd.grad(found, latents)[0], gradient)
    assert torch.equal(scores, kept)


def test_no_row_counts() -> None:
    latents, before, weight, _, _ = inputs(torch.float32)
    latents.requires_grad_()
    none = torch.full((13,), -100)
    found = linear_loss(latents, weight, None, none, -100, None, before=Before(before, weight, None, 0.7))
    found.backward()
    assert found == 0
    assert not latents.grad.any()
