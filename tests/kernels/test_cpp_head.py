"""The C++ local head against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.kernels import cpp, reference

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason=f"no C++ backend: {cpp.unavailable('cpu')}")


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 9),
    dim=st.integers(1, 70),
    classes=st.integers(2, 12),
    rows=st.integers(2, 12),
    kind=st.sampled_from(["none", "vector", "matrix", "transposed", "logits"]),
    normalize=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_local_head(
    batch: int, dim: int, classes: int, rows: int, kind: str, normalize: bool, smoothing: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(batch + 100 * dim + classes)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    basis = modulation = None
    if kind == "logits":
        dim, normalize = classes, False
    else:
        count = rows if kind in ("matrix", "transposed") else classes
        basis = torch.randn(count, dim, generator=generator)
        shapes = {"vector": (classes,), "matrix": (count, classes), "transposed": (classes, count)}
        if kind in shapes:
            modulation = torch.randn(shapes[kind], generator=generator)
        if kind == "transposed":
            modulation = modulation.T
    if not normalize:
        # Scores of 1e4 carry float32 rounding of a thousandth into the exponentials: no tolerance would tell anything.
        scale = min(scale, 1.0)
    latents = scale * torch.randn(batch, dim, generator=generator)
    options = {"normalize": normalize, "temperature": 0.7, "label_smoothing": smoothing, "basis_gradient": True}
    totals, true_totals = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    got = cpp.local_head(latents, labels, basis, modulation, **options, totals=totals)
    truth = [None if t is None else t.double() for t in (latents, basis, modulation)]
    expected = reference.local_head(truth[0], labels, *truth[1:], **options, totals=true_totals)
    size = max(1.0, float(latents.abs().max())) * max(1, dim) ** 0.5
    for name, a, b in zip(got._fields, got, expected, strict=True):
        if a is None or b is None or name == "correct":  # near ties may fall either way in float32
            assert (a is None) == (b is None) or (name == "basis_grad" and basis is None)
            continue
        assert torch.isfinite(a).all(), name
        # Sums that cancel are as exact as their largest neighbours (1e12 where latents of zero are normalised).
        near = 1e-5 * max(size, float(b.abs().max()))
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-4, atol=near, msg=lambda m, n=name: n + m)
    assert totals[0] == pytest.approx(float(true_totals[0]), rel=2e-4, abs=1e-5 * size)


def test_counts_are_exact_where_scores_are_equal() -> None:
    """Logits of few values, so that most labels share their score with others."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(4, (200, 12), generator=generator).float()
    labels = torch.randint(12, (200,), generator=generator)
    totals, expected = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    cpp.local_head(logits, labels, None, normalize=False, totals=totals)
    reference.local_head(logits, labels, None, normalize=False, totals=expected)
    assert totals[1:].tolist() == expected[1:].tolist()
    cpp.local_head(logits, labels, None, normalize=False, totals=totals[:2])
    assert totals[1:].tolist() == [2 * expected[1], expected[2]]
