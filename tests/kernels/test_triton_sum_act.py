"""A residual block's end in Triton, against float64 autograd; in bfloat16 against the float32 kernel, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_ends import check_sum_act, image
from stored import stored

pytest.importorskip("triton")
from unlocked.kernels import triton as fused

# Windows of one pixel, of a plane, and larger than a tile; more channels than a block has; and one program's few.
SIZES = [
    ((2, 16, 4, 4), 2),
    ((3, 37, 6, 9), 3),
    ((1, 5, 1, 1), 1),
    ((2, 33, 4, 2), 1),
    ((1, 3, 40, 48), 1),
    ((300, 40, 2, 2), 2),
    ((5, 1, 4, 4), 4),
]


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("shape", "p"), SIZES)
def test_values_latents_and_gradients(shape: tuple[int, ...], p: int, slope: float, kernel_device: str) -> None:
    check_sum_act(fused, shape, p, slope, kernel_device)


@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 40, 4, 4, 3))), slope=st.sampled_from([0.0, 0.01, 1.0, 1.5])
)
@settings(max_examples=15)
def test_any_size(sizes: tuple[int, ...], slope: float, kernel_device: str) -> None:
    batch, channels, down, across, p = sizes
    check_sum_act(fused, (batch, channels, down * p, across * p), p, slope, kernel_device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_kernel_rounded_once(dtype: torch.dtype, kernel_device: str) -> None:
    a, b = (image((2, 20, 4, 6), seed, kernel_device).to(dtype) for seed in (0, 1))
    grad = torch.randn(2, 80).to(kernel_device)
    y, latents = fused.sum_act_forward(a, b, 2, 0.1)
    exact, exact_latents = fused.sum_act_forward(a.float(), b.float(), 2, 0.1)
    assert torch.equal(y, stored(exact, dtype))
    torch.testing.assert_close(latents, exact_latents, rtol=1e-6, atol=1e-6)  # of sums in another order
    given_back = fused.sum_act_backward(grad, y, 2, 0.1)
    assert torch.equal(given_back, stored(fused.sum_act_backward(grad, y.float(), 2, 0.1), dtype))


def test_what_is_not_a_number_stays_so(kernel_device: str) -> None:
    a, b = image((1, 16, 2, 2), 0, kernel_device), image((1, 16, 2, 2), 1, kernel_device)
    a[0, 3, 1, 0], b[0, 5, 0, 0] = float("nan"), float("inf")
    y, latents = fused.sum_act_forward(a, b, 1, 0.0)
    assert y[0, 3, 1, 0].isnan()
    assert y[0, 5, 0, 0].isinf()
    assert latents[0, 3].isnan()
    assert latents[0, 5].isinf()
    a[0, 5, 0, 0], b[0, 5, 0, 0] = -float("inf"), 1.0
    assert fused.sum_act_forward(a, b, 1, 0.0)[0][0, 5, 0, 0] == 0.0


def test_what_does_not_fit(kernel_device: str) -> None:
    a = image((1, 4, 4, 4), 0, kernel_device)
    with pytest.raises(ValueError, match="does not tile"):
        fused.sum_act_forward(a, a, 3, 0.0)
    with pytest.raises(ValueError, match="float64"):
        fused.sum_act_forward(a.double(), a.double(), 2, 0.0)
    with pytest.raises(ValueError, match=r"b must be .* channels-last"):
        fused.sum_act_forward(a, a.contiguous(), 2, 0.0)
    with pytest.raises(ValueError, match="no latents"):
        fused.sum_act_forward(a, a, 0, 0.0)
    with pytest.raises(ValueError, match="grad must be"):
        fused.sum_act_backward(torch.ones(1, 4, device=kernel_device), a, 2, 0.0)
