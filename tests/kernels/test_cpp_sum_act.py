"""A residual block's end in C++, against float64 autograd; in bfloat16 against the float32 kernel, rounded once."""

import pytest
import torch
from residual_ends import check_sum_act, image

from unlocked.kernels import cpp

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

SIZES = [((2, 16, 4, 4), 2), ((3, 37, 6, 9), 3), ((1, 5, 1, 1), 1), ((2, 33, 4, 2), 1)]


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("shape", "p"), SIZES)
def test_values_latents_and_gradients(shape: tuple[int, ...], p: int, slope: float) -> None:
    check_sum_act(cpp, shape, p, slope)


@pytest.mark.parametrize("slope", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "p"), SIZES)
def test_one_image_alone(shape: tuple[int, ...], p: int, dtype: torch.dtype, slope: float) -> None:
    a = image(shape, 0).to(dtype)
    expected = cpp.sum_act_forward(a, torch.zeros_like(a), p, slope)
    assert all(torch.equal(x, y) for x, y in zip(cpp.sum_act_forward(a, None, p, slope), expected, strict=True))
    y, _ = cpp.sum_act_forward(a, None, p, slope, in_place=True)
    assert y is a
    assert torch.equal(a, expected[0])


def test_bfloat16_is_the_float32_kernel_rounded_once() -> None:
    a, b = image((2, 20, 4, 6), 0).bfloat16(), image((2, 20, 4, 6), 1).bfloat16()
    grad = torch.randn(2, 80)
    y, latents = cpp.sum_act_forward(a, b, 2, 0.1)
    exact, exact_latents = cpp.sum_act_forward(a.float(), b.float(), 2, 0.1)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(latents, exact_latents)
    assert torch.equal(cpp.sum_act_backward(grad, y, 2, 0.1), cpp.sum_act_backward(grad, y.float(), 2, 0.1).bfloat16())


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, grad = image((5, 20, 4, 4), 0), image((5, 20, 4, 4), 1), torch.randn(5, 80)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, latents = cpp.sum_act_forward(a, b, 2, 0.0)
        found.append((y, latents, cpp.sum_act_backward(grad, y, 2, 0.0)))
    for other in found[1:]:
        assert all(torch.equal(x, z) for x, z in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    a, b = image((1, 16, 2, 2), 0), image((1, 16, 2, 2), 1)
    a[0, 3, 1, 0], b[0, 5, 0, 0] = float("nan"), float("inf")
    y, latents = cpp.sum_act_forward(a, b, 1, 0.0)
    assert y[0, 3, 1, 0].isnan()
    assert y[0, 5, 0, 0].isinf()
    assert latents[0, 3].isnan()
    assert latents[0, 5].isinf()
    a[0, 5, 0, 0], b[0, 5, 0, 0] = -float("inf"), 1.0
    assert cpp.sum_act_forward(a, b, 1, 0.0)[0][0, 5, 0, 0] == 0.0
