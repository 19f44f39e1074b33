"""Attention and its way back in C++, against float64 autograd; in bfloat16 against the float32 kernel, rounded once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from unlocked.kernels import cpp

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")


def _heads(batch: int, tokens: int, heads: int, d: int, seed: int) -> Tensor:
    """[B, heads, T, d], as a layer's product gives it: a position's heads side by side."""
    return torch.randn(batch, tokens, heads, d, generator=torch.Generator().manual_seed(seed)).transpose(1, 2)


def _both_ways(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: object) -> list[Tensor]:
    y, sums = cpp.attention_forward(q, k, v, **options)  # type: ignore[arg-type]
    out = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    cpp.attention_backward(grad, q, k, v, y, sums, out, **options)  # type: ignore[arg-type]
    return [y, *out]


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 150), st.integers(1, 150), st.integers(1, 3), st.integers(1, 70)),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_any_sizes(sizes: tuple[int, ...], causal: bool, scale: float | None, seed: int) -> None:
    batch, queries, keys, heads, d = sizes
    lengths = (queries, keys, keys, queries)
    q, k, v, grad = (_heads(batch, n, heads, d, seed + place) for place, n in enumerate(lengths))
    truth = [x.double().requires_grad_() for x in (q, k, v)]
    expected = scaled_dot_product_attention(*truth, is_causal=causal, scale=scale)
    expected.backward(grad.double())
    found = _both_ways(q, k, v, grad, causal=causal, scale=scale)
    for value, true in zip(found, [expected.detach(), *(x.grad for x in truth)], strict=True):
        assert true is not None
        assert float((value.double() - true).abs().max()) <= 2e-5 * float(true.abs().max()) + 1e-5


def test_the_gradients_go_where_they_are_told_to() -> None:
    """Into parts of one tensor, and from a gradient whose last dimension is not dense."""
    q, k, v = torch.randn(2, 40, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    grad = torch.randn(2, 2, 16, 40).transpose(2, 3)
    expected = _both_ways(q.contiguous(), k.contiguous(), v.contiguous(), grad.contiguous())
    whole = torch.empty(2, 40, 3, 2, 16)
    y, sums = cpp.attention_forward(q, k, v)
    assert torch.equal(y, expected[0])
    cpp.attention_backward(grad, q, k, v, y, sums, list(whole.permute(2, 0, 3, 1, 4).unbind(0)))
    for part, one in zip(whole.permute(2, 0, 3, 1, 4).unbind(0), expected[1:], strict=True):
        assert torch.equal(part, one)


def test_places_need_not_be_dense() -> None:
    q, k, v, grad = (_heads(2, 40, 2, 16, seed) for seed in range(4))
    y, sums = cpp.attention_forward(q, k, v)
    out = [torch.empty(2, 2, 16, 40).transpose(2, 3) for _ in range(3)]
    cpp.attention_backward(grad, q, k, v, y, sums, out)
    for found, expected in zip(out, _both_ways(q, k, v, grad)[1:], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_the_float32_kernel_rounded_once(causal: bool) -> None:
    q, k, v, grad = (_heads(2, 70, 2, 24, seed).bfloat16() for seed in range(4))
    found = _both_ways(q, k, v, grad, causal=causal)
    y, sums = cpp.attention_forward(q.float(), k.float(), v.float(), causal=causal)
    out = [torch.empty_like(x, dtype=torch.float32) for x in (q, k, v)]
    kept = y.bfloat16()  # what the way back has of it
    cpp.attention_backward(grad.float(), q.float(), k.float(), v.float(), kept.float(), sums, out, causal=causal)
    for value, exact in zip(found, [y, *out], strict=True):
        assert torch.equal(value, exact.bfloat16())


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = (_heads(3, 50, 3, 20, seed) for seed in range(4))
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(_both_ways(q, k, v, grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_numbers_that_are_none_spoil_their_own_rows() -> None:
    q, k, v, grad = (_heads(1, 33, 1, 16, seed) for seed in range(4))
    q[0, 0, 5, 3], v[0, 0, 7, 2] = float("nan"), float("inf")
    y, *_ = _both_ways(q, k, v, grad)
    expected = scaled_dot_product_attention(q, k, v)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    far = _heads(1, 33, 1, 16, 0) * 1e4  # scores beyond what e^x can take
    found, *grads = _both_ways(far, far, v.nan_to_num(posinf=0.0), grad)
    assert all(x.isfinite().all() for x in (found, *grads))


def test_whom_the_kernels_are_for() -> None:
    def takes(keys: int, *, dtype: torch.dtype = torch.float32, width: int = 16) -> bool:
        q, k = torch.empty(1, 2, 50, 16, dtype=dtype), torch.empty(1, 2, keys, width, dtype=dtype)
        return cpp.takes_attention(q, k, k)

    wide = takes(64)  # whether this processor is one of those
    assert [takes(keys) for keys in (31, 32, 1024, 1025)] == [False, wide, wide, False]
    assert [takes(keys, dtype=torch.bfloat16) for keys in (256, 257)] == [False, wide]
    assert not takes(64, width=8)
    assert not takes(64, dtype=torch.float16)
    q, other = torch.empty(1, 2, 300, 16), torch.empty(1, 2, 300, 16, dtype=torch.bfloat16)
    assert not cpp.takes_attention(q, q, other)
    assert not cpp.takes_attention(*(torch.empty(2, 64, 16) for _ in range(3)))
