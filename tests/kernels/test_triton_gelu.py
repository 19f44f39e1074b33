"""GELU and its way back in Triton, against float64 autograd; in half precision the float32 kernel, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import stored
from torch import Tensor
from torch.nn.functional import gelu

pytest.importorskip("triton")
from unlocked.kernels import triton as fused

# One element, a row that is wider than blocks, several runs of rows, a vector longer than a block.
SHAPES = [(1, 1), (3, 5), (70, 16), (2, 65, 33), (4097,), (2100, 3), (40, 4000)]


def _values(shape: tuple[int, ...], device: str, seed: int = 0) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(device)


def _check(shape: tuple[int, ...], device: str, *, one_row: bool = False) -> None:
    """`one_row`: the gradient is the same for all of dimension 1, and stands there once."""
    x = _values(shape, device)
    grad = _values((shape[0], 1, shape[2]), device, 1).expand(shape) if one_row else _values(shape, device, 1)
    truth = x.double().requires_grad_()
    expected = gelu(truth)
    expected.backward(grad.double())
    assert truth.grad is not None
    kept = x.clone()
    y, slope = fused.gelu_forward(kept, in_place=True)
    assert slope is kept
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    apart, slope_apart = fused.gelu_forward(x)
    assert torch.equal(apart, y)
    assert torch.equal(slope_apart, slope)
    product, sums = fused.gelu_backward(grad, slope)
    assert product is slope
    assert sums.dtype == torch.float32
    torch.testing.assert_close(product.double(), truth.grad, rtol=1e-6, atol=5e-6)
    wanted = truth.grad.reshape(-1, shape[-1]).sum(0)
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-6 * (10 + x.numel() / shape[-1]))
    again = fused.gelu_backward(grad, slope_apart)
    assert torch.equal(again[0], product)
    assert torch.equal(again[1], sums)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_slopes_and_sums(shape: tuple[int, ...], kernel_device: str) -> None:
    _check(shape, kernel_device)


@pytest.mark.parametrize("shape", [(3, 5, 7), (40, 33, 70), (2, 1, 3)])
def test_a_gradient_that_tokens_share(shape: tuple[int, ...], kernel_device: str) -> None:
    _check(shape, kernel_device, one_row=True)


@given(shape=st.tuples(*(st.integers(1, most) for most in (5, 30, 90))), one_row=st.booleans())
@settings(max_examples=15)
def test_any_size(shape: tuple[int, ...], one_row: bool, kernel_device: str) -> None:
    _check(shape, kernel_device, one_row=one_row)


def test_a_gradient_of_any_strides(kernel_device: str) -> None:
    x, grad = _values((6, 10), kernel_device), _values((10, 6), kernel_device, 1)
    slope = fused.gelu_forward(x)[1]
    expected = slope * grad.T
    product, _ = fused.gelu_backward(grad.T, slope)
    assert torch.equal(product, expected)


@pytest.mark.filterwarnings("ignore:.*encountered in multiply:RuntimeWarning")
def test_every_size_of_number(kernel_device: str) -> None:
    """What is not a number stays so; x itself, or zero, where nothing is left of the tail."""
    numbers = [0.0, -0.0, 1e-30, -5.0, -9.0, 9.0, 40.0, -40.0, 1e30, -1e30, float("nan"), float("inf")]
    x = torch.tensor(numbers, device=kernel_device)
    y, slope = fused.gelu_forward(x)
    truth = x.double()[:10].requires_grad_()
    expected = gelu(truth)
    expected.sum().backward()
    assert truth.grad is not None
    torch.testing.assert_close(y[:10].double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope[:10].double(), truth.grad, rtol=1e-6, atol=1e-6)
    assert y[10].isnan()
    assert slope[10].isnan()
    assert y[11] == float("inf")
    grad = torch.ones(2, 3, device=kernel_device)
    grad[0, 1], grad[1, 2] = float("nan"), float("inf")
    product, sums = fused.gelu_backward(grad, torch.ones(2, 3, device=kernel_device))
    assert torch.equal(product.isnan(), grad.isnan())
    assert sums[1].isnan()
    assert sums[2] == float("inf")
    assert sums[0] == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_kernel_rounded_once(dtype: torch.dtype, kernel_device: str) -> None:
    x, grad = (_values((70, 33), kernel_device, seed).to(dtype) for seed in (0, 1))
    y, slope = fused.gelu_forward(x)
    exact_y, exact_slope = fused.gelu_forward(x.float())
    assert torch.equal(y, stored(exact_y, dtype))
    assert torch.equal(slope, stored(exact_slope, dtype))
    exact, exact_sums = fused.gelu_backward(grad.float(), slope.float())
    product, sums = fused.gelu_backward(grad, slope)
    assert torch.equal(product, stored(exact, dtype))
    assert torch.equal(sums, exact_sums)


def test_nothing(kernel_device: str) -> None:
    x = torch.empty(0, 3, device=kernel_device)
    y, slope = fused.gelu_forward(x)
    assert y.shape == slope.shape == (0, 3)
    assert torch.equal(fused.gelu_backward(y, slope)[1], torch.zeros(3, device=kernel_device))


def test_what_does_not_fit(kernel_device: str) -> None:
    x = _values((3, 4), kernel_device)
    with pytest.raises(ValueError, match="float64"):
        fused.gelu_forward(x.double())
    with pytest.raises(ValueError, match="must be dense"):
        fused.gelu_forward(x[:, :2])
    with pytest.raises(ValueError, match="must be dense"):
        fused.gelu_forward(x[:, :1].expand(3, 4))
    with pytest.raises(ValueError, match="grad like it"):
        fused.gelu_backward(x[:2], x)
    with pytest.raises(ValueError, match="slope must be contiguous"):
        fused.gelu_backward(x.T, x.T)
