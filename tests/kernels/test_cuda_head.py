"""The CUDA local head against the reference in float64. On a GPU or emulated.

Tolerances: a few float32 operations per value and sums of many terms (1e-5 of the largest), half a unit in the last
place of the output's type, and what the rounding of large scores makes of the softmax (see `_rounding_of_scores`).
"""

from typing import Any

import pytest
import torch
from cuda_cases import DTYPES, ROUNDING, assert_near, needs_gpu
from torch import Tensor

from unlocked.kernels import cuda, reference

# Batch, latents, rows of the basis, classes (None: no modulation, 0: a vector).
Case = tuple[int, int, int, int | None]
SMALL: tuple[Case, ...] = (
    (1, 7, 3, 5),
    (5, 33, 40, 0),
    (9, 64, 10, 10),  # from here on, four images per block where there are two multiprocessors
    (10, 30, 10, None),
    (13, 32, 20, 0),
    (2, 16, 600, 33),
)
LARGE: tuple[Case, ...] = (
    (64, 512, 10, None),
    (64, 512, 10, 0),
    (64, 512, 20, 10),
    (2200, 64, 10, 10),  # four images per block
    (2201, 30, 10, None),
    (3, 8192, 1000, 1000),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", SMALL)
def test_rules(case: Case, normalize: bool, dtype: torch.dtype, cuda_device: str) -> None:
    _check_rule(case, normalize, dtype, cuda_device)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", LARGE)
def test_large_rules(case: Case, normalize: bool, dtype: torch.dtype) -> None:
    _check_rule(case, normalize, dtype, "cuda")


@pytest.mark.parametrize("batch", [64, 601])  # one image per block, and four: without a basis a branch of its own
@pytest.mark.parametrize("normalize", [True, False])
def test_logits(normalize: bool, batch: int, cuda_device: str) -> None:
    latents = torch.randn(batch, 10, generator=torch.Generator().manual_seed(0))
    _check_head(latents, torch.arange(batch) % 10, None, None, {"normalize": normalize}, cuda_device)


@pytest.mark.parametrize("classes", [0, 3])
def test_modulation_without_a_basis(classes: int, cuda_device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(9, 10, generator=generator)
    modulation = torch.randn((10, classes) if classes else (10,), generator=generator)
    labels = torch.arange(9) % modulation.shape[-1]
    _check_head(latents, labels, None, modulation, {"normalize": True, "temperature": 0.5}, cuda_device)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-6, 1e6, 1e25])
def test_extreme_latents(scale: float, cuda_device: str) -> None:
    latents = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * scale
    _check_head(latents, torch.arange(6), reference.make_basis(10, 24), None, {"normalize": True}, cuda_device)


def test_extreme_scores_and_ties(cuda_device: str) -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [2.0, 2.0, 2.0], [-1e4, 0.0, 0.0], [0.0, 1.0, float("nan")]])
    _check_head(scores, torch.tensor([1, 0, 1, 2]), None, None, {"normalize": False, "temperature": 0.5}, cuda_device)


@pytest.mark.parametrize("batch", [3, 601])
def test_classes_out_of_question_have_no_part(batch: int, cuda_device: str) -> None:
    """Logits masked with -inf, as autograd in float64 has them."""
    logits = torch.randn(batch, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 1:4] = logits[2, 5] = -float("inf")
    labels = torch.arange(batch) % 3
    truth = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(truth / 0.5, labels)
    loss.backward()
    found = cuda.local_head(logits.to(cuda_device), labels.to(cuda_device), None, normalize=False, temperature=0.5)
    torch.testing.assert_close(found.loss_sum.double().cpu(), batch * loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.latents_grad.double().cpu(), truth.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("classes", [None, 70_000])
def test_what_has_no_room_in_shared_memory_is_the_references(classes: int | None, cuda_device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if classes is None:  # logits of a large output layer
        logits = torch.randn(2, 70_000, generator=generator)
        _check_head(logits, torch.tensor([3, 69_999]), None, None, {"normalize": False}, cuda_device)
        return
    latents, basis = torch.randn(2, 8, generator=generator), torch.randn(3, 8, generator=generator)
    modulation = torch.randn(3, classes, generator=generator)
    _check_head(latents, torch.tensor([0, 69_999]), basis, modulation, {"normalize": True}, cuda_device)


def test_wrong_label_is_seen(cuda_device: str) -> None:
    labels = torch.tensor([0, 3], device=cuda_device)
    result = cuda.local_head(torch.randn(2, 3, device=cuda_device), labels, None, normalize=False)
    assert result.loss_sum.isnan()


def _check_rule(case: Case, normalize: bool, dtype: torch.dtype, device: str) -> None:
    batch, dim, rows, classes = case
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
    _check_head(latents, labels, reference.make_basis(rows, dim), modulation, options, device)


def _check_head(
    latents: Tensor,
    labels: Tensor,
    basis: Tensor | None,
    modulation: Tensor | None,
    options: dict[str, Any],
    device: str,
) -> None:
    tensors = (latents, labels, basis, modulation)
    given: list[Any] = [None if tensor is None else tensor.to(device) for tensor in tensors]
    if modulation is not None:  # .to() may have dropped the strides
        base = torch.zeros((*modulation.shape, 2), device=device)
        base[..., 0] = given[3]
        given[3] = base[..., 0]
    totals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=device)
    actual = cuda.local_head(*given, **options, totals=totals)
    exact: list[Any] = [None if t is None else t.double() if t.is_floating_point() else t for t in given]
    # The scores and their argmax from latents as wide as the kernel's own arithmetic.
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    expected = reference.local_head(*exact, **options, totals=sums)
    assert actual.latents_grad.dtype == latents.dtype
    assert actual.correct == expected.correct
    share = 1e-5 + _rounding_of_scores(exact[0], exact[2], exact[3], options)
    assert_near("loss_sum", actual.loss_sum, expected.loss_sum, 1e-5, 0.0)
    assert_near("latents_grad", actual.latents_grad, expected.latents_grad, ROUNDING[latents.dtype], share)
    for name in ("modulation_grad", "basis_grad"):
        if getattr(expected, name) is None:
            assert getattr(actual, name) is None
        else:
            assert_near(name, getattr(actual, name), getattr(expected, name), 1e-5, share)
    torch.testing.assert_close(totals[0] - 1.0, actual.loss_sum.double(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert totals[1] - 2.0 == actual.correct
    assert totals[2] - 3.0 == sums[2]


def _rounding_of_scores(
    latents: Tensor, basis: Tensor | None, modulation: Tensor | None, options: dict[str, Any]
) -> float:
    """What float32 scores lose of the softmax: a score s is off by at least 2**-24 |s|, its rounding, and so is the
    one that it is compared with; exp() makes of that distance a relative error."""
    scores = torch.nn.functional.normalize(latents, eps=1e-12) if options["normalize"] else latents
    if basis is not None:
        scores = scores @ basis.T
    if modulation is not None:
        scores = scores @ modulation if modulation.dim() == 2 else scores * modulation
    return 2 * 2**-24 * scores.nan_to_num(0.0).abs().max().item() / options.get("temperature", 1.0)
