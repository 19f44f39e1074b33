"""The C++ optimizers against torch.optim's own and `AdamWSF`, in float32 and with float64 as the truth."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.kernels import cpp
from unlocked.kernels.schedule_free import AdamWSF

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason=f"no C++ backend: {cpp.unavailable('cpu')}")
optim = pytest.importorskip("unlocked.kernels.cpp.optim")

# One element, channels last, odd sizes, and more than one piece of work.
SHAPES: list[tuple[int, ...]] = [(8, 4, 3, 3), (1,), (), (5, 7), (40_001,)]
# Both sides do the same dozen float32 operations per step on values around 1, in another order: half a unit in the
# last place (6e-8) each, of either sign over 20 steps.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
LIBRARY = {
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adam-decay": partial(torch.optim.Adam, lr=0.01, betas=(0.0, 0.95), weight_decay=0.1, eps=1e-3),
    "adam-decoupled": partial(torch.optim.Adam, lr=0.01, weight_decay=0.5, decoupled_weight_decay=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
    "adamw-sf": partial(AdamWSF, lr=0.01, weight_decay=0.1),
    "adamw-sf-warmup": partial(AdamWSF, lr=0.02, betas=(0.8, 0.9), warmup_steps=6, r=1.0, weight_lr_power=1.5),
    "sgd": partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
    "sgd-momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True),
}
Maker = Callable[[list[Tensor]], torch.optim.Optimizer]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[0] = made[0].to(memory_format=torch.channels_last)
    return [nn.Parameter(p) for p in made]


def gradients(step: int) -> list[Tensor]:
    """All contiguous, also of the parameter that is channels last."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def library_steps(make: Maker, params: list[Tensor], steps: range) -> Any:
    optimizer = make(params)
    _train(optimizer)
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()
    return optimizer


def native(make: Maker, params: list[Tensor]) -> Any:
    found = optim.from_torch(make(params))
    assert found is not None
    found.train()
    return found


def _train(optimizer: Any) -> None:
    """Schedule-free optimizers start in evaluation mode."""
    if hasattr(optimizer, "train"):
        optimizer.train()


@pytest.mark.parametrize("make", LIBRARY.values(), ids=LIBRARY)
def test_follows_the_library(make: Maker) -> None:
    ours, single, truth = parameters(), parameters(), [nn.Parameter(p.detach().double()) for p in parameters()]
    optimizer = native(make, ours)
    for step in range(20):
        optimizer.step(gradients(step))
    library_steps(make, single, range(20))
    library_steps(make, truth, range(20))
    for mine, library, exact in zip(ours, single, truth, strict=True):
        torch.testing.assert_close(mine, library, **TOLERANCE)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", LIBRARY.values(), ids=LIBRARY)
def test_its_state_is_the_librarys(make: Maker) -> None:
    """Ten steps of ours go on for ten more in the library, and the other way round."""
    ours, library, straight = parameters(), parameters(), parameters()
    first = native(make, ours)
    for step in range(10):
        first.step(gradients(step))
    other = make(ours)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(10, 20):
        for p, grad in zip(ours, gradients(step), strict=True):
            p.grad = grad
        other.step()

    begun = library_steps(make, library, range(10))
    second = native(make, library)
    second.load_state_dict(copy.deepcopy(begun.state_dict()))
    for step in range(10, 20):
        second.step(gradients(step))

    library_steps(make, straight, range(20))
    for a, b, c in zip(ours, library, straight, strict=True):
        torch.testing.assert_close(a, c, **TOLERANCE)
        torch.testing.assert_close(b, c, **TOLERANCE)


@pytest.mark.parametrize("make", [LIBRARY["adam"], LIBRARY["sgd-momentum"]], ids=["adam", "sgd"])
def test_a_new_learning_rate_counts_from_the_next_step(make: Maker) -> None:
    ours, library = parameters(), parameters()
    optimizer, other = native(make, ours), make(library)
    for step, lr in enumerate((0.1, 0.01, 0.001)):
        optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = lr
        for p, grad in zip(library, gradients(step), strict=True):
            p.grad = grad
        optimizer.step(gradients(step))
        other.step()
    for a, b in zip(ours, library, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("make", LIBRARY.values(), ids=LIBRARY)
def test_results_do_not_depend_on_threads(make: Maker) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params = parameters()
            optimizer = native(make, params)
            for step in range(3):
                optimizer.step(gradients(step))
            results.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_it_does_not_know_stays_with_the_library() -> None:
    weight = nn.Parameter(torch.zeros(3))
    unknown = [
        torch.optim.Adam([{"params": [weight]}, {"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0}]),
        torch.optim.Adam([nn.Parameter(torch.zeros(2, dtype=torch.float64))]),
        torch.optim.Adam([nn.Parameter(torch.zeros(4, 4).t()[1:])]),
    ]
    assert [optim.from_torch(optimizer) for optimizer in unknown] == [None] * len(unknown)


def test_a_missing_gradient_is_an_error() -> None:
    optimizer = native(LIBRARY["adam"], parameters())
    with pytest.raises(ValueError, match="one gradient per parameter: 5, got 4"):
        optimizer.step(gradients(0)[:4])
    with pytest.raises(ValueError, match="one gradient per parameter: 5, got 0"):
        optimizer.step()
    with pytest.raises(ValueError, match="gradients, not a closure"):
        optimizer.step(lambda: torch.zeros(()))
    optimizer = optim.from_torch(AdamWSF([nn.Parameter(torch.zeros(3))]))
    with pytest.raises(ValueError, match="evaluation mode; call train"):
        optimizer.step([torch.zeros(3)])


def test_averaged_weights_are_the_librarys() -> None:
    ours, library = parameters(), parameters()
    optimizer = native(LIBRARY["adamw-sf"], ours)
    other = library_steps(LIBRARY["adamw-sf"], library, range(5))
    for step in range(5):
        optimizer.step(gradients(step))
    for switch in ("eval", "train"):
        getattr(optimizer, switch)()
        getattr(other, switch)()
        for a, b in zip(ours, library, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
