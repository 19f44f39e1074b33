"""A residual block's end in C++, against float64 autograd; in bfloat16 against the float32 kernel, rounded once."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, leaky_relu

from unlocked.kernels import cpp

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

SIZES = [((2, 16, 4, 4), 2), ((3, 37, 6, 9), 3), ((1, 5, 1, 1), 1), ((2, 33, 4, 2), 1)]


def _image(shape: tuple[int, ...], seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("shape", "p"), SIZES)
def test_values_latents_and_gradients(shape: tuple[int, ...], p: int, slope: float) -> None:
    a, b = _image(shape, 0), _image(shape, 1)
    grad = torch.randn(shape[0], shape[1] * p * p, generator=torch.Generator().manual_seed(2))
    truth = [x.double().requires_grad_() for x in (a, b)]
    expected = leaky_relu(truth[0] + truth[1], slope)
    latents = adaptive_avg_pool2d(expected, p).flatten(1)
    latents.backward(grad.double())
    y, found = cpp.sum_act_forward(a, b, p, slope)
    torch.testing.assert_close(y.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.double(), latents.detach(), rtol=1e-5, atol=1e-6)
    given = cpp.sum_act_backward(grad, y, p, slope)
    for x in truth:
        torch.testing.assert_close(given.double(), x.grad, rtol=1e-6, atol=1e-7)
    kept = a.clone()
    again, _ = cpp.sum_act_forward(kept, b, p, slope, in_place=True)
    assert again is kept
    assert torch.equal(again, y)


def test_bfloat16_is_the_float32_kernel_rounded_once() -> None:
    a, b = _image((2, 20, 4, 6), 0).bfloat16(), _image((2, 20, 4, 6), 1).bfloat16()
    grad = torch.randn(2, 80)
    y, latents = cpp.sum_act_forward(a, b, 2, 0.1)
    exact, exact_latents = cpp.sum_act_forward(a.float(), b.float(), 2, 0.1)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(latents, exact_latents)
    assert torch.equal(cpp.sum_act_backward(grad, y, 2, 0.1), cpp.sum_act_backward(grad, y.float(), 2, 0.1).bfloat16())


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, grad = _image((5, 20, 4, 4), 0), _image((5, 20, 4, 4), 1), torch.randn(5, 80)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, latents = cpp.sum_act_forward(a, b, 2, 0.0)
        found.append((y, latents, cpp.sum_act_backward(grad, y, 2, 0.0)))
    for other in found[1:]:
        assert all(torch.equal(x, z) for x, z in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    a, b = _image((1, 16, 2, 2), 0), _image((1, 16, 2, 2), 1)
    a[0, 3, 1, 0], b[0, 5, 0, 0] = float("nan"), float("inf")
    y, latents = cpp.sum_act_forward(a, b, 1, 0.0)
    assert y[0, 3, 1, 0].isnan()
    assert y[0, 5, 0, 0].isinf()
    assert latents[0, 3].isnan()
    assert latents[0, 5].isinf()
    a[0, 5, 0, 0], b[0, 5, 0, 0] = -float("inf"), 1.0
    assert cpp.sum_act_forward(a, b, 1, 0.0)[0][0, 5, 0, 0] == 0.0
