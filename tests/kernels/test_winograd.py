"""Convolutions by minimal filtering, against float64, against the library, and whole runs against each other."""

from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from engine_runs import dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked import LLS, Trainer
from unlocked.kernels.cpp import winograd
from unlocked.models import Block
from unlocked.runtime.engines import engine_class

pytestmark = pytest.mark.skipif(bool(winograd.unavailable("cpu")), reason=winograd.unavailable("cpu") or "-")

aten = torch.ops.aten
ONES = ((1, 1), (1, 1))  # stride, dilation


def _pair(padding: int) -> tuple[int, int]:
    return padding, padding


def _backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True] * 3)
    return aten.convolution_backward(grad, x, weight, [len(weight)], *sizes)


def _inputs(batch: int, channels: int, outputs: int, height: int, width: int, padding: int) -> list[Tensor]:
    """x, the kernel, the bias and the result's gradient."""
    sizes = [
        (batch, channels, height, width),
        (outputs, channels, 3, 3),
        (batch, outputs, height + 2 * padding - 2, width + 2 * padding - 2),
    ]
    x, weight, grad = (torch.randn(size).contiguous(memory_format=torch.channels_last) for size in sizes)
    return [x, weight * (2 / (9 * channels)) ** 0.5, torch.randn(outputs), grad]


def _made(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, padding: int) -> list[Tensor]:
    """The result, and the gradients at the input, of the kernel and of the bias."""
    options = (_pair(1), _pair(padding), _pair(1), 1)
    result = winograd.convolution(x, weight, bias, *options)
    return [result, *winograd.convolution_backward(grad, x, weight, *options, [True] * 3)]


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, padding: int) -> list[Tensor]:
    x, weight, grad = x.double(), weight.double(), grad.double()
    result = F.conv2d(x, weight, None if bias is None else bias.double(), 1, padding)
    return [result, *_backward(grad, x, weight, padding)]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([16, 32, 48]),
    outputs=st.sampled_from([32, 64, 96]),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    padding=st.integers(0, 2),
    biased=st.booleans(),
    last=st.booleans(),
)
@settings(max_examples=60)
def test_any_sizes(
    batch: int, channels: int, outputs: int, height: int, width: int, padding: int, biased: bool, last: bool
) -> None:
    assume(min(height, width) + 2 * padding >= 3)
    x, weight, bias, grad = _inputs(batch, channels, outputs, height, width, padding)
    weight = weight if last else weight.contiguous()
    given_bias = bias if biased else None
    found = _made(x, weight, given_bias, grad, padding)
    for one, exact in zip(found, _exact(x, weight, given_bias, grad, padding), strict=True):
        assert one.shape == exact.shape
        assert _error(one, exact) < 1e-6
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[2].stride() == weight.stride()


@pytest.mark.parametrize("sizes", [(4, 128, 256, 16, 16, 1), (8, 256, 128, 8, 8, 1)])
def test_no_further_from_the_exact_result_than_four_times_the_library(sizes: tuple[int, ...]) -> None:
    x, weight, bias, grad = _inputs(*sizes)
    library = [F.conv2d(x, weight, bias, 1, 1), *_backward(grad, x, weight, 1)]
    exact = _exact(x, weight, bias, grad, 1)
    for found, theirs, true in zip(_made(x, weight, bias, grad, 1), library, exact, strict=True):
        assert _error(found, true) < 4 * _error(theirs, true)


def test_the_number_of_threads_changes_no_bit() -> None:
    given = _inputs(7, 32, 64, 9, 13, 1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_made(*given, 1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "case",
    ["channels", "outputs", "kernel", "stride", "dilation", "groups", "padding", "layout", "bfloat16", "float64"],
)
def test_what_it_does_not_take_is_the_librarys(case: str) -> None:
    channels, outputs = {"channels": (15, 32), "outputs": (16, 33)}.get(case, (32, 32))
    groups = 2 if case == "groups" else 1
    side = 5 if case == "kernel" else 3
    stride, dilation = (_pair(2 if case == name else 1) for name in ("stride", "dilation"))
    padding = (1, 0) if case == "padding" else (1, 1)
    dtype = getattr(torch, case, torch.float32)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    x = torch.randn(2, channels, 8, 8, dtype=dtype)
    x = x if case == "layout" else x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels // groups, side, side, dtype=dtype)
    options = (stride, padding, dilation, groups)
    found, expected = winograd.convolution(x, weight, None, *options), F.conv2d(x, weight, None, *options)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    sizes = (*options[:3], False, [0, 0], groups, [True] * 3)
    theirs = aten.convolution_backward(grad, x, weight, [outputs], *sizes)
    ours = winograd.convolution_backward(grad, x, weight, *options, [True] * 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_only_what_is_asked_for_and_a_width_that_the_way_back_does_not_take() -> None:
    x, weight, _, grad = _inputs(2, 48, 32, 6, 6, 1)  # 48 is no multiple of 32: the input's gradient is the library's
    options = (_pair(1), _pair(1), _pair(1), 1)
    of_input, of_kernel, of_bias = winograd.convolution_backward(grad, x, weight, *options, [True, False, False])
    assert of_kernel is None
    assert of_bias is None
    assert torch.equal(of_input, _backward(grad, x, weight, 1)[0])
    assert winograd.convolution_backward(grad, x, weight, *options, [False, True, False])[0] is None


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x, weight, bias, grad = _inputs(1, 16, 32, 6, 6, 1)
    x[0, 3, 2, 2] = value
    found = _made(x, weight, bias, grad, 1)
    assert not torch.isfinite(found[0][0, :, 1:4, 1:4]).any()
    assert not torch.isfinite(found[2][:, 3]).all()


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.branch(x))


def _blocks() -> list[Block]:
    torch.manual_seed(3)
    first = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    last = nn.Sequential(nn.Flatten(), nn.Linear(32 * 8 * 8, 5))
    return [Block("conv", first), Block("first", _Residual(32)), Block("second", _Residual(32)), Block("output", last)]


def _trained(engine: str, kernels: str = "cpp_winograd", **options: int) -> tuple[Trainer, str]:
    """The trainer after an epoch, and the digest of its weights."""
    settings = {"seed": 5, "statistics_batches": 2, "optimizer": partial(torch.optim.SGD, lr=0.01)}
    trainer = Trainer(_blocks(), rule=LLS(), engine=engine_class(engine)(**options), kernels=kernels, **settings)
    return trainer, trainer.fit(dataset(70), epochs=1, batch_size=16).weights_sha256


@pytest.mark.alone
def test_engines_agree_and_the_step_is_made_of_it() -> None:
    sequential, digest = _trained("sequential")
    assert _trained("streams", stages=3)[1] == digest
    assert _trained("processes", stages=2)[1] == digest
    direct, other = _trained("sequential", "cpp")
    assert other != digest
    theirs = direct.module.state_dict()
    for name, value in sequential.module.state_dict().items():
        assert _error(value.double(), theirs[name].double()) < 1e-3, name
    calls = [call for layer in sequential.explain(dataset(70), batch_size=16).layers for call in layer.calls]
    assert sum("own convolution" in call.why for call in calls) == 4


@pytest.mark.parametrize(("rule", "convolutions"), [(LLS(), 4), ("BP", 0)])
def test_an_evaluation_is_made_as_the_training_is(rule: Any, convolutions: int) -> None:
    """Of two micro-batches, after two that re-estimate BatchNorm's statistics: each has four 3 x 3 convolutions."""

    def filtered(**evaluation: Any) -> int:
        settings: dict[str, Any] = {"statistics_batches": 2, "optimizer": partial(torch.optim.SGD, lr=0.01)}
        trainer = Trainer(_blocks(), rule=rule, kernels="cpp_winograd", seed=5, **settings)
        with patch.object(winograd, "_filtered", wraps=winograd._filtered) as calls:
            trainer.fit(dataset(70), epochs=1, batch_size=16, **evaluation)
        return calls.call_count

    assert filtered(eval_data=dataset(40), eval_batch_size=25) - filtered() == (2 + 2) * convolutions
