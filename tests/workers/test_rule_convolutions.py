"""Convolutions of a rule's own modules on a backend that has them."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from engine_runs import dataset
from torch import Tensor, nn

from unlocked import Trainer
from unlocked.kernels import cpp
from unlocked.kernels.cpp import winograd
from unlocked.models import Block
from unlocked.rules import InfoPro, PredictiveSimilarity
from unlocked.workers.rule_convolutions import convolving

pytestmark = pytest.mark.skipif(bool(winograd.unavailable("cpu")), reason=winograd.unavailable("cpu") or "-")


def _gradients(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *, twice: bool = False) -> list[Tensor]:
    given = [one.detach().clone().requires_grad_() for one in (x, weight, bias) if one is not None]
    result = conv(*given)
    loss = result.sin().sum()
    if twice:
        steep = torch.autograd.grad(loss, given, create_graph=True)
        loss = loss + sum(one.square().sum() for one in steep)
    return [result.detach(), *torch.autograd.grad(loss, given)]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_results_and_gradients_are_the_library_s(has_bias: bool, twice: bool) -> None:
    """Also gradients of gradients, and of inputs whose channels don't lie together."""
    x, weight = torch.randn(3, 32, 9, 7), 0.1 * torch.randn(64, 32, 3, 3)
    bias = torch.randn(64) if has_bias else None

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with convolving(winograd):
            return F.conv2d(x, weight, bias, padding=1)

    with patch.object(winograd, "_filtered", wraps=winograd._filtered) as filtered:
        found = _gradients(conv, x, weight, bias, twice=twice)
    assert filtered.call_count == 2  # forward, and for the input; the first of two ways back is the library's
    exact = _gradients(
        lambda *given: F.conv2d(*given, padding=1),
        *(x.double(), weight.double(), None if bias is None else bias.double()),
        twice=twice,
    )
    for one, other in zip(found, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}, {"padding": (1, 0)}]
)
def test_others_stay_the_library_s(options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    x, weight = torch.randn(2, 32, 8, 8), torch.randn(64, 32 // groups, 3, 3)
    with convolving(winograd):
        assert torch.equal(F.conv2d(x, weight, **options), F.conv2d(x, weight, **options))
        found = F.conv2d(input=x, weight=weight, **options)
    assert torch.equal(found, F.conv2d(x, weight, **options))


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((2, 48, 8, 8), (64, 32, 3, 3), None),
        ((2, 16, 8, 8), (64, 32, 3, 3), None),
        ((2, 32, 8, 8), (64, 32, 3, 3), torch.zeros(10)),
        ((2, 32, 8, 8), (64, 32, 3, 3), torch.zeros(64, dtype=torch.float64)),
    ],
)
def test_what_does_not_fit_is_the_library_s_error(x: Any, weight: Any, bias: Tensor | None) -> None:
    with convolving(winograd), pytest.raises(RuntimeError):
        F.conv2d(torch.randn(x), torch.randn(weight), bias)


def test_autocast_and_functional_transforms_stay_the_library_s() -> None:
    x, weight = torch.randn(2, 32, 8, 8), 0.1 * torch.randn(64, 32, 3, 3)
    with convolving(winograd):
        with torch.autocast("cpu", torch.bfloat16):
            assert F.conv2d(x, weight).dtype == torch.bfloat16
        found = torch.func.grad(lambda w: F.conv2d(x, w, padding=(1,)).sin().sum())(weight)
        filtered = F.conv2d(x, weight, padding=(1,))
    torch.testing.assert_close(found, torch.func.grad(lambda w: F.conv2d(x, w, padding=1).sin().sum())(weight))
    torch.testing.assert_close(filtered, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)


def test_without_convolutions_of_its_own_a_backend_leaves_the_library_s() -> None:
    x, weight = torch.randn(2, 32, 8, 8), torch.randn(64, 32, 3, 3)
    for backend in (None, cpp):
        with convolving(backend):
            assert torch.equal(F.conv2d(x, weight), F.conv2d(x, weight))


@pytest.mark.parametrize("rule", [PredictiveSimilarity, InfoPro])
def test_rules_train_by_them(rule: Any) -> None:
    """Of level 1 and of whole passes: the run uses them, and is near the one that doesn't."""

    def losses(kernels: str) -> float:
        torch.manual_seed(0)
        first = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 5))
        blocks = [Block("first", first, latent_size=2), Block("output", head, is_output=True)]
        trainer = Trainer(blocks, rule=rule, optimizer=torch.optim.Adam, kernels=kernels)
        return trainer.fit(dataset(40), epochs=1, batch_size=10).local_losses["first"]

    plain = losses("cpp")
    with patch.object(winograd, "_kernel_gradient", wraps=winograd._kernel_gradient) as gradient:
        filtered = losses("cpp_winograd")
    assert gradient.call_count > 0
    assert filtered == pytest.approx(plain, rel=1e-3)
