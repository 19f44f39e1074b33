"""Matrices turned round in C++: bit by bit what the library's copy gives, whatever the sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlocked.kernels import cpp

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

SIZES = st.tuples(st.integers(0, 5), st.integers(1, 70), st.integers(1, 70))


@given(SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]), st.booleans())
def test_every_element_comes_to_its_place(shape: tuple[int, int, int], dtype: torch.dtype, in_place: bool) -> None:
    batch, rows, columns = shape
    x = torch.arange(batch * rows * columns).view(shape).to(dtype)
    out = torch.full((batch, columns, rows), 7, dtype=dtype) if in_place else None
    result = cpp.transposed(x, out)
    assert out is None or result is out
    assert result.is_contiguous()
    assert torch.equal(result, x.transpose(1, 2))


def test_what_the_kernel_does_not_take() -> None:
    x = torch.randn(3, 40, 50)
    assert torch.equal(cpp.transposed(x.transpose(1, 2)), x)
    wide = torch.zeros(3, 50, 80)
    cpp.transposed(x, wide[..., ::2])
    assert torch.equal(wide[..., ::2], x.transpose(1, 2))
    assert not wide[..., 1::2].any()
    other = torch.zeros(3, 50, 40, dtype=torch.bfloat16)
    cpp.transposed(x, other)
    assert torch.equal(other, x.transpose(1, 2).bfloat16())


@pytest.mark.parametrize("shape", [(2, 300, 130), (1, 32, 33), (5, 129, 31)])
def test_not_a_number_keeps_its_bits(shape: tuple[int, int, int]) -> None:
    x = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32).view(torch.float32)
    found = cpp.transposed(x).view(torch.int32)
    assert torch.equal(found, x.view(torch.int32).transpose(1, 2))
