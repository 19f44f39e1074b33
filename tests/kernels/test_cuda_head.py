"""The CUDA local head against the reference in float64. On a GPU only.

Tolerances as in test_triton_norm_act.py: a few float32 operations per value (2e-6 of the largest), sums of many terms
(2e-5 of the largest), and half a unit in the last place of the output's type.
"""

from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, DTYPES, ROUNDING, assert_near
from torch import Tensor

from unlocked.kernels import cuda, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Batch, latents, rows of the basis, classes (None: no modulation, 0: a vector).
CASES: tuple[tuple[int, int, int, int | None], ...] = (
    (64, 512, 10, None),
    (64, 512, 10, 0),
    (64, 512, 20, 10),
    (1, 7, 3, 5),
    (5, 33, 40, 0),
    (2200, 64, 10, 10),  # four images per block
    (2201, 30, 10, None),
    (3, 8192, 1000, 1000),
    (2, 16, 600, 33),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "dim", "rows", "classes"), CASES)
def test_rules(batch: int, dim: int, rows: int, classes: int | None, normalize: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    modulation = None
    if classes is not None:
        # Every second column of a wider matrix: strides that are not those of a contiguous one.
        wide = torch.randn(rows, 2 * classes if classes else 2, generator=generator)
        modulation = wide[:, ::2] if classes else wide[:, 0]
    latents = torch.randn(batch, dim, generator=generator).to(dtype)
    labels = torch.randint(0, classes or rows, (batch,), generator=generator)
    options = {
        "normalize": normalize,
        "temperature": 0.5 * dim**0.5,
        "label_smoothing": 0.1,
        "basis_gradient": True,
    }
    _check_head(latents, labels, reference.make_basis(rows, dim), modulation, options)


def test_logits() -> None:
    latents = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    for normalize in (True, False):
        _check_head(latents, torch.arange(64) % 10, None, None, {"normalize": normalize})


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-6, 1e6, 1e25])
def test_extreme_latents(scale: float) -> None:
    latents = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * scale
    _check_head(latents, torch.arange(6), reference.make_basis(10, 24), None, {"normalize": True})


def test_extreme_scores_and_ties() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [2.0, 2.0, 2.0], [-1e4, 0.0, 0.0], [0.0, 1.0, float("nan")]])
    _check_head(scores, torch.tensor([1, 0, 1, 2]), None, None, {"normalize": False, "temperature": 0.5})


def test_wrong_label_is_seen() -> None:
    labels = torch.tensor([0, 3], device=DEVICE)
    result = cuda.local_head(torch.randn(2, 3, device=DEVICE), labels, None, normalize=False)
    assert result.loss_sum.isnan()


def _check_head(
    latents: Tensor, labels: Tensor, basis: Tensor | None, modulation: Tensor | None, options: dict[str, Any]
) -> None:
    tensors = (latents, labels, basis, modulation)
    given: list[Any] = [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]
    if modulation is not None:  # .to() may have dropped the strides
        base = torch.zeros((*modulation.shape, 2), device=DEVICE)
        base[..., 0] = given[3]
        given[3] = base[..., 0]
    totals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    actual = cuda.local_head(*given, **options, totals=totals)
    exact: list[Any] = [None if t is None else t.double() if t.is_floating_point() else t for t in given]
    # The scores and their argmax from latents as wide as the kernel's own arithmetic.
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    expected = reference.local_head(*exact, **options, totals=sums)
    assert actual.latents_grad.dtype == latents.dtype
    assert actual.correct == expected.correct
    assert_near("loss_sum", actual.loss_sum, expected.loss_sum, 1e-5, 0.0)
    assert_near("latents_grad", actual.latents_grad, expected.latents_grad, ROUNDING[latents.dtype], 1e-5)
    for name in ("modulation_grad", "basis_grad"):
        if getattr(expected, name) is None:
            assert getattr(actual, name) is None
        else:
            assert_near(name, getattr(actual, name), getattr(expected, name), 1e-5, 1e-5)
    torch.testing.assert_close(totals[0] - 1.0, actual.loss_sum.double(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert totals[1] - 2.0 == actual.correct
    assert totals[2] - 3.0 == sums[2]
