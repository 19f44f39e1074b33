"""GELU, SiLU and their ways back in C++, against float64 autograd; in bfloat16 against float32, rounded once."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from unlocked.kernels import cpp
from unlocked.workers.graph import products

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

SHAPES = [(1, 1), (3, 5), (70, 16), (2, 65, 33), (4097,)]


FUNCTIONS = {"GELU": (cpp.gelu_forward, gelu), "SiLU": (cpp.silu_forward, silu)}


def _values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_slopes_and_sums(shape: tuple[int, ...], name: str) -> None:
    x, grad = _values(shape), _values(shape, 1)
    kernel, function = FUNCTIONS[name]
    truth = x.double().requires_grad_()
    expected = function(truth)
    expected.backward(grad.double())
    assert truth.grad is not None
    kept = x.clone()
    y, slope = kernel(kept, in_place=True)
    assert slope is kept
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    given, sums = cpp.gelu_backward(grad, slope)
    torch.testing.assert_close(given.double(), truth.grad, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(sums.double(), truth.grad.reshape(-1, shape[-1]).sum(0), rtol=1e-5, atol=1e-4)


def test_every_size_of_number() -> None:
    """The tail is small but right; what is not a number stays so; x itself where the tail is gone."""
    x = torch.tensor([0.0, -0.0, 1e-30, -5.0, -9.0, 9.0, 40.0, -40.0, 1e30, -1e30, float("nan"), float("inf")])
    y, slope = cpp.gelu_forward(x)
    truth = x.double()[:10].requires_grad_()
    # torch makes the tail of 1 + erf, of which even float64 leaves little at -9.
    expected = truth * torch.special.erfc(-truth / 2**0.5) / 2
    expected.sum().backward()
    assert truth.grad is not None
    torch.testing.assert_close(y[:10].double(), expected.detach(), rtol=3e-5, atol=1e-37)
    torch.testing.assert_close(slope[:10].double(), truth.grad, rtol=3e-5, atol=1e-37)
    assert y[10].isnan()
    assert y[11] == float("inf")


def test_every_size_of_number_for_silu() -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -5.0, -60.0, 9.0, 90.0, -90.0, 1e30, -1e30, float("nan"), float("inf")])
    y, slope = cpp.silu_forward(x)
    truth = x.double()[:10].requires_grad_()
    expected = silu(truth)
    expected.sum().backward()
    assert truth.grad is not None
    torch.testing.assert_close(y[:10].double(), expected.detach(), rtol=1e-6, atol=1e-35)
    torch.testing.assert_close(slope[:10].double(), truth.grad, rtol=1e-6, atol=1e-35)
    assert y[10].isnan()
    assert slope[10].isnan()
    assert y[11] == float("inf")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_is_the_float32_kernel_rounded_once(name: str) -> None:
    x, grad = _values((70, 33)).bfloat16(), _values((70, 33), 1).bfloat16()
    kernel, _ = FUNCTIONS[name]
    y, slope = kernel(x)
    exact_y, exact_slope = kernel(x.float())
    assert torch.equal(y, exact_y.bfloat16())
    assert torch.equal(slope, exact_slope.bfloat16())
    exact, exact_sums = cpp.gelu_backward(grad.float(), slope.float())
    given, sums = cpp.gelu_backward(grad, slope)
    assert torch.equal(given, exact.bfloat16())
    assert torch.equal(sums, exact_sums)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = _values((300, 40)), _values((300, 40), 1)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, slope = FUNCTIONS[name][0](x)
        found.append((y, *cpp.gelu_backward(grad, slope)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("features", [(24, 40), (33, 17)])
def test_a_product_by_either_library(features: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a weight as it lies, and of the same turned round, as on the way back."""
    inside, out = features
    x, weight, bias = _values((3, 5, inside)), _values((out, inside), 1), _values((out,), 2)
    grad = _values((3, 5, out), 3)
    monkeypatch.setattr(products, "_LARGE", 0)
    for onednn in (True, False):
        monkeypatch.setattr(products, "_prefers_onednn", lambda onednn=onednn: onednn)
        found = products.product(x, weight, bias), products.product(x, weight), products.product(grad, weight.T)
        exact = x.double() @ weight.double().T
        wanted = exact + bias.double(), exact, grad.double() @ weight.double()
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
