"""2 x 2 max pooling in C++, bit for bit the library's, and its way back."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from unlocked.kernels import cpp

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

SHAPES = [(2, 16, 4, 4), (3, 37, 5, 8), (1, 5, 2, 3), (2, 33, 7, 7)]


def _image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Of few values, so that many windows have two that are the largest."""
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _image(shape, dtype).requires_grad_()
    expected = max_pool2d(x, 2)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected.backward(grad)
    y, places = cpp.max_pool_forward(x.detach())
    assert torch.equal(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = cpp.max_pool_backward(grad, places, *shape[2:])
    assert x.grad is not None
    assert torch.equal(found, x.grad)


def test_what_is_not_a_number_is_the_largest() -> None:
    x = _image((1, 17, 4, 4), torch.float32)
    x[0, 3, 1, 0], x[0, 5, 2, 2], x[0, 16, 3, 3] = float("nan"), float("inf"), -float("inf")
    y, _ = cpp.max_pool_forward(x)
    torch.testing.assert_close(y, max_pool2d(x, 2), equal_nan=True, rtol=0, atol=0)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grad = torch.randn(3, 20, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(3, 20, 3, 3)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, places = cpp.max_pool_forward(x)
        found.append((y, places, cpp.max_pool_backward(grad, places, 6, 6)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
