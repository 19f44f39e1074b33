"""`AdamWSF` against its rule in float64, with x, y and z held apart, for as long as an epoch or several.

The rule here is the averaged one of the paper, x <- x + c (z - x) and y = (1 - beta1) z + beta1 x; the optimizers never
hold x. Float32 rounds half a unit in the last place (6e-8) a few times per step: 2,000 steps of either sign leave
about 3e-6 of values around 1, and ten times that is allowed.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unlocked.kernels import cpp
from unlocked.kernels.schedule_free import AdamWSF

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 5e-3},
    "decay": {"lr": 5e-3, "weight_decay": 0.1},
    "warm-up": {"lr": 5e-3, "weight_decay": 0.01, "warmup_steps": 300},
    "powers": {"lr": 5e-3, "warmup_steps": 50, "r": 1.0, "weight_lr_power": 0.5, "betas": (0.8, 0.99)},
    "no-weighting": {"lr": 5e-3, "weight_lr_power": 0.0, "eps": 1e-4},
}
CPP = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++")


def start() -> Tensor:
    return torch.linspace(-1, 2, 40)


def gradient(step: int) -> Tensor:
    """Of a constant sign in some entries, of changing ones in others."""
    return torch.cos(3 * start() + 0.37 * step) + 0.5 * torch.sin(5 * start())


def truth(steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights in training (y) and the averaged ones (x) after `steps`, float64."""
    values = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 0, "r": 0.0}
    values |= {"weight_lr_power": 2.0} | options
    beta1, beta2 = values["betas"]
    x = z = start().double()
    v, total, largest = torch.zeros_like(x), 0.0, 0.0
    for k in range(steps):
        y = (1 - beta1) * z + beta1 * x
        grad = gradient(k).double()
        v = beta2 * v + (1 - beta2) * grad**2
        rate = values["lr"] * min(1.0, (k + 1) / max(values["warmup_steps"], 1)) * math.sqrt(1 - beta2 ** (k + 1))
        largest = max(largest, rate)
        weight = (k + 1) ** values["r"] * largest ** values["weight_lr_power"]
        total += weight
        z = z - rate * (grad / (v.sqrt() + values["eps"]) + values["weight_decay"] * y)
        x = x + weight / total * (z - x)
    return (1 - beta1) * z + beta1 * x, x


def torch_optimizer(parameter: Tensor, **options: Any) -> Any:
    return AdamWSF([parameter], **options)


def cpp_optimizer(parameter: Tensor, **options: Any) -> Any:
    return pytest.importorskip("unlocked.kernels.cpp.optim").from_torch(AdamWSF([parameter], **options))


def triton_optimizer(parameter: Tensor, **options: Any) -> Any:
    return pytest.importorskip("unlocked.kernels.triton.optim").from_torch(AdamWSF([parameter], **options))


def check(make: Callable[..., Any], steps: int, device: str, options: dict[str, Any]) -> None:
    parameter = torch.nn.Parameter(start().to(device))
    optimizer = make(parameter, **options)
    assert optimizer is not None
    optimizer.train()
    for step in range(steps):
        parameter.grad = gradient(step).to(device)
        optimizer.step()
    y, x = truth(steps, **options)
    tolerance = {"rtol": 3e-5, "atol": 3e-5}
    torch.testing.assert_close(parameter.detach().cpu().double(), y, **tolerance)
    optimizer.eval()
    torch.testing.assert_close(parameter.detach().cpu().double(), x, **tolerance)
    optimizer.train()
    torch.testing.assert_close(parameter.detach().cpu().double(), y, **tolerance)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [torch_optimizer, pytest.param(cpp_optimizer, marks=CPP)])
def test_two_thousand_steps_are_the_rules(make: Callable[..., Any], options: dict[str, Any]) -> None:
    check(make, 2000, "cpu", options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tritons_steps_are_the_rules(options: dict[str, Any], kernel_device: str) -> None:
    """Few in the interpreter, with the whole warm-up in them."""
    steps = 2000 if kernel_device == "cuda" else 60
    check(triton_optimizer, steps, kernel_device, options | {"warmup_steps": min(options.get("warmup_steps", 0), 40)})


def test_the_librarys_newest_is_another_rule() -> None:
    """The first steps weigh in its average as much as later ones: these tests tell the two apart."""
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(AssertionError, match="Mismatched"):
        check(lambda p, **options: schedulefree.AdamWScheduleFree([p], **options), 200, "cpu", OPTIONS["plain"])


def test_it_steps_as_torchs_optimizers_do() -> None:
    """Parameters without a gradient are left alone, gradients as they are; a closure is called; groups differ."""
    a, b, c = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = AdamWSF([{"params": [a, c]}, {"params": [b], "lr": 0.0}], lr=0.1)
    with pytest.raises(ValueError, match="evaluation mode; call train"):
        optimizer.step()
    optimizer.train()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert torch.equal(c, torch.ones(3))
    assert torch.equal(b, torch.ones(3))
    assert bool((a < 1).all())
    assert a.grad is not None
    assert torch.equal(a.grad, torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"betas": (0.0, 0.9)}, r"the first above 0 .* got \(0.0, 0.9\)"),
        ({"betas": (0.9, 1.0)}, "must be below 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWSF([start()], **options)
