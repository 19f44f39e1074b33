"""2 x 2 max pooling in Triton, bit for bit the library's, and its way back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import max_pool2d

pytest.importorskip("triton")
from unlocked.kernels import triton as fused

# Odd sides, more channels than a block has, one channel, many windows.
SHAPES = [(2, 16, 4, 4), (3, 37, 5, 8), (1, 5, 2, 3), (2, 133, 7, 7), (3, 1, 3, 2), (9, 3, 40, 33)]


def _image(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Of few values, so that many windows have two that are the largest."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last).to(device)


def _check(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = _image(shape, dtype, device)
    truth = x.double().requires_grad_()  # of which the library, too, takes the first of equals
    expected = max_pool2d(truth, 2)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected.backward(grad.double())
    assert truth.grad is not None
    y, places = fused.max_pool_forward(x)
    assert y.dtype == dtype
    assert torch.equal(y.double(), expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert places.dtype == torch.uint8
    found = fused.max_pool_backward(grad, places, *shape[2:])
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.double(), truth.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, kernel_device: str) -> None:
    _check(shape, dtype, kernel_device)


@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(2, 9), st.integers(2, 9)))
@settings(max_examples=15)
def test_any_size(shape: tuple[int, ...], kernel_device: str) -> None:
    _check(shape, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_is_the_largest(dtype: torch.dtype, kernel_device: str) -> None:
    x = _image((1, 17, 4, 4), dtype, kernel_device)
    x[0, 3, 1, 0], x[0, 5, 2, 2], x[0, 16, 3, 3] = float("nan"), float("inf"), -float("inf")
    x[0, 7, :2, :2] = float("-inf")
    x[0, 8, 0, 0] = x[0, 9, 1, 1] = x[0, 9, 0, 0] = float("nan")
    x.requires_grad_()
    expected = max_pool2d(x, 2)
    y, places = fused.max_pool_forward(x.detach())
    torch.testing.assert_close(y, expected.detach(), equal_nan=True, rtol=0, atol=0)
    grad = torch.ones_like(y)
    grad[0, 1, 0, 0], grad[0, 2, 1, 1] = float("nan"), float("inf")
    expected.backward(grad)
    found = fused.max_pool_backward(grad, places, 4, 4)
    torch.testing.assert_close(found, x.grad, equal_nan=True, rtol=0, atol=0)


def test_what_does_not_fit(kernel_device: str) -> None:
    x = _image((2, 3, 4, 4), torch.float32, kernel_device)
    with pytest.raises(ValueError, match="channels-last"):
        fused.max_pool_forward(x.contiguous())
    with pytest.raises(ValueError, match="2 x 2 pixels or more"):
        fused.max_pool_forward(x[:, :, :1])
    with pytest.raises(ValueError, match="float64"):
        fused.max_pool_forward(x.double())
    y, places = fused.max_pool_forward(x)
    with pytest.raises(ValueError, match="grad and places must be"):
        fused.max_pool_backward(y, places, 6, 4)
    with pytest.raises(ValueError, match="grad and places must be"):
        fused.max_pool_backward(y, places[:1], 4, 4)
