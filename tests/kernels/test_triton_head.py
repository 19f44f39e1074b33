"""The Triton head against the reference in float64, and rules made of one's own pieces against autograd."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from unlocked.kernels import reference  # noqa: E402
from unlocked.kernels.triton import head as head_module  # noqa: E402
from unlocked.kernels.triton import head_kernels  # noqa: E402
from unlocked.kernels.triton.head import HeadPieces, local_head, make_head  # noqa: E402
from unlocked.kernels.triton.pieces import first_maximum_is  # noqa: E402

# Float32 sums of up to some hundred products of rounded terms: about sqrt(terms) * 2**-24 of the largest entry, then
# amplified by logits of some tens. Half precision adds the rounding of the stored gradient: 2**-8 for bfloat16 (2**-7
# in the interpreter, which cuts bits off) and 2**-11 for float16.
SINGLE = 2e-5
STORED = {torch.float32: SINGLE, torch.bfloat16: 2**-7, torch.float16: 2**-10}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KINDS = ("none", "vector", "matrix", "transposed")


def _case(
    batch: int,
    dim: int,
    rows: int | None,
    kind: str,
    *,
    classes: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(latents, labels, basis, modulation) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, dim, generator=generator).to(dtype)
    basis = None if rows is None else torch.randn(rows, dim, generator=generator)
    raw = dim if rows is None else rows
    modulation = None
    if kind == "vector":
        modulation = torch.randn(raw, generator=generator)
    elif kind == "matrix":
        modulation = torch.randn(raw, classes, generator=generator)
    elif kind == "transposed":
        modulation = torch.randn(classes, raw, generator=generator).T
    num_classes = raw if modulation is None else modulation.shape[-1]
    return latents, torch.randint(num_classes, (batch,), generator=generator), basis, modulation


def _move(tensor: Tensor | None, device: str) -> Tensor | None:
    """To the device with the same strides."""
    if tensor is None or tensor.device.type == device:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def _check(case: tuple[Tensor, Tensor, Tensor | None, Tensor | None], device: str, **options: Any) -> None:
    """The kernel on `device` against the reference in float64 on the CPU, totals included."""
    truth = [None if t is None else t.double() if t.is_floating_point() else t for t in case]
    totals = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    expected = reference.local_head(*truth, **options, totals=totals)  # type: ignore[arg-type]
    moved_totals = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64, device=device)
    actual = local_head(*[_move(t, device) for t in case], **options, totals=moved_totals)  # type: ignore[arg-type]

    assert actual.latents_grad.dtype == case[0].dtype
    assert int(actual.correct) == int(expected.correct)
    torch.testing.assert_close(moved_totals.cpu(), totals, rtol=SINGLE, atol=SINGLE)
    for name, tolerance in (
        ("loss_sum", SINGLE),
        ("latents_grad", STORED[case[0].dtype]),
        ("modulation_grad", SINGLE),
        ("basis_grad", SINGLE),
    ):
        got, want = getattr(actual, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.shape == want.shape, name
            # Row by row, because the gradient of zero latents is 1e12 times the others'. A row that is sure of its
            # label has a small gradient, but the rounding of a probability near one.
            by_row = name == "latents_grad"
            size = want.abs().amax(1, keepdim=True) if by_row else want.abs().max()
            least = 0.3 / options.get("temperature", 1.0) / (len(case[0]) if by_row else 1)
            error = float(((got.double().cpu() - want) / size.clamp_min(least)).abs().max())
            assert error < tolerance, f"{name}: {error:.2e} of the largest entry"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_matches_the_reference(kind: str, normalize: bool, kernel_device: str) -> None:
    case = _case(9, 37, 11, kind)
    _check(case, kernel_device, normalize=normalize, temperature=0.5, label_smoothing=0.1, basis_gradient=True)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_basis(kind: str, kernel_device: str) -> None:
    _check(_case(5, 10, None, kind), kernel_device, normalize=False)


@pytest.mark.parametrize("dtype", STORED)
def test_every_dtype(dtype: torch.dtype, kernel_device: str) -> None:
    _check(_case(6, 32, 10, "vector", dtype=dtype), kernel_device, temperature=0.7)


@pytest.mark.parametrize(
    ("batch", "dim", "rows", "classes", "kind"),
    [
        (1, 1, 1, 1, "none"),  # one of everything
        (1, 3, 2, 7, "matrix"),  # one row
        (70, 40, 20, 10, "matrix"),  # more rows than one step of the batch product takes
        (3, 600, 33, 5, "matrix"),  # a basis in several tiles
        (2, 16, 40, 35, "matrix"),  # a modulation gradient in several tiles
        (2, 20, 300, 40, "transposed"),  # a modulation in several tiles
        pytest.param(2049, 4, 3, 3, "vector", marks=[pytest.mark.gpu, needs_gpu]),  # sums in several steps
    ],
)
def test_sizes(batch: int, dim: int, rows: int, classes: int, kind: str, kernel_device: str) -> None:
    _check(_case(batch, dim, rows, kind, classes=classes), kernel_device, basis_gradient=batch < 100)


def test_several_rows_per_program(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at large batches: programs of four rows, the last with one."""
    monkeypatch.setattr(head_module, "_MANY_ROWS", 9)
    _check(_case(9, 21, 5, "matrix"), kernel_device, basis_gradient=True)
    _check(_case(9, 521, 40, "vector"), kernel_device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels keep their constants")
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_sums_in_several_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at batch 2049, which takes the interpreter half a minute: four rows per program, the last with one, and every
    loop over the batch goes round several times, the last time not full."""
    monkeypatch.setattr(head_module, "_MANY_ROWS", 33)
    for name, steps in (("_SUM_CHUNK", 8), ("_VECTOR_CHUNK", 64), ("_PRODUCT_CHUNK", 16)):
        assert getattr(head_kernels, name).value > steps
        monkeypatch.setattr(head_kernels, name, tl.constexpr(steps))
    _check(_case(33, 4, 3, kind), "cpu", basis_gradient=True)


@pytest.mark.parametrize("classes", [3, 17])
def test_counts_are_exact_where_scores_are_equal(classes: int, kernel_device: str) -> None:
    """Logits of few values, so that most labels share their score with others; with and without the third total."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(4, (40, classes), generator=generator).float()
    labels = torch.randint(classes, (40,), generator=generator)
    for count in (2, 3):
        totals, expected = (torch.full((count,), 7.0, dtype=torch.float64, device=d) for d in (kernel_device, "cpu"))
        local_head(logits.to(kernel_device), labels.to(kernel_device), None, normalize=False, totals=totals)
        reference.local_head(logits, labels, None, normalize=False, totals=expected)
        assert totals[1:].tolist() == expected[1:].tolist()


def test_the_arrival_counter_is_back_at_zero(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch.zeros(4, dtype=torch.int32, device=kernel_device)
    monkeypatch.setattr(head_module, "arrival_counter", lambda device: counter)
    for _ in range(2):
        _check(_case(3, 8, 4, "vector"), kernel_device)
        assert counter.tolist() == [0, 0, 0, 0]


def test_non_contiguous_tensors(kernel_device: str) -> None:
    latents, labels, basis, modulation = _case(8, 24, 10, "matrix", classes=12)
    assert basis is not None
    assert modulation is not None
    strided = latents.T.contiguous().T[::2, ::2], (labels % 4)[::2], basis[:, 1::2], modulation[:, 2::3]
    assert not any(t.is_contiguous() for t in strided)
    _check(strided, kernel_device)


@given(
    batch=st.integers(1, 6),
    dim=st.integers(1, 40),
    rows=st.none() | st.integers(1, 20),
    classes=st.integers(1, 20),
    kind=st.sampled_from(KINDS),
    normalize=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    temperature=st.floats(0.25, 4.0),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_small_shape(
    batch: int,
    dim: int,
    rows: int | None,
    classes: int,
    kind: str,
    normalize: bool,
    smoothing: float,
    temperature: float,
    seed: int,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = _case(batch, dim, rows, kind, classes=classes, seed=seed)
    _check(case, device, normalize=normalize, label_smoothing=smoothing, temperature=temperature)


def test_zero_latents_and_huge_logits_stay_finite(kernel_device: str) -> None:
    latents, labels, basis, _ = _case(4, 16, 5, "none")
    latents[1] = 0
    latents[2] *= 1e-14  # below the clamp of the norm, but not zero
    _check((latents, labels, basis, None), kernel_device)
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, -1e4]])
    _check((logits, torch.tensor([0, 0]), None, None), kernel_device, normalize=False, label_smoothing=0.1)
    result = local_head(logits.to(kernel_device), torch.tensor([0, 0], device=kernel_device), None, normalize=False)
    assert float(result.loss_sum) == pytest.approx(1e4)
    assert torch.isfinite(result.latents_grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_classes_out_of_question_have_no_part(kernel_device: str, temperature: float) -> None:
    """Logits masked with -inf."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits[0, 1:4] = logits[2, 5] = -float("inf")
    _check((logits, torch.tensor([0, 1, 2]), None, None), kernel_device, normalize=False, temperature=temperature)


def test_ties_count_for_the_first(kernel_device: str) -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]], device=kernel_device)
    result = local_head(logits, torch.tensor([0, 1], device=kernel_device), None, normalize=False)
    assert int(result.correct) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.randn(2, 4, dtype=torch.float64)}, "torch kernels for float64"),
        ({"latents": torch.randn(0, 4)}, "B > 0"),
        ({"labels": torch.tensor([0])}, r"int64 \[2\]"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be in 0 \.\. 2"),
        ({"basis": torch.randn(3, 5)}, r"float \[R, 4\]"),
        ({"modulation": torch.randn(4)}, r"\[3\] or \[3, N\]"),
        ({"temperature": 0.0}, "positive"),
        ({"totals": torch.zeros(2)}, r"float64 \[2\] or \[3\]"),
        ({"basis": None, "basis_gradient": True}, "needs a basis"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {"latents": torch.randn(2, 4), "labels": torch.tensor([0, 1]), "basis": torch.randn(3, 4)}
    with pytest.raises(ValueError, match=message):
        local_head(**(arguments | change))


@pytest.mark.parametrize("case", [(3, 4, 8193, "none"), (3, 8193, 5, "vector"), (3, 8193, None, "none")])
def test_sizes_beyond_the_kernels_are_the_references(case: Any, kernel_device: str) -> None:
    _check(_case(*case), kernel_device, temperature=2.0, label_smoothing=0.1)
    latents, labels, basis, _ = (_move(t, kernel_device) for t in _case(*case))
    with pytest.raises(ValueError, match="at most 8192"):
        make_head(HeadPieces())(latents, labels, basis)


def test_a_matrix_may_have_more_classes_than_the_kernel_holds(kernel_device: str) -> None:
    _check(_case(3, 4, 5, "matrix", classes=8193), kernel_device, temperature=2.0)


# Rules of one's own


@triton.jit
def _squared_error(scores, label, inside, CLASSES: tl.constexpr, temperature, label_smoothing):  # type: ignore[no-untyped-def]
    error = tl.where(inside, scores - tl.where(tl.arange(0, scores.shape[0]) == label, 1.0, 0.0), 0.0)
    return tl.sum(error * error, axis=0), 2.0 * error, first_maximum_is(label, scores, inside)


@triton.jit
def _goodness(scores, label, inside, CLASSES: tl.constexpr, threshold, label_smoothing):  # type: ignore[no-untyped-def]
    """Forward-Forward: label 1 wants the sum of squares above the threshold, label 0 below."""
    margin = tl.sum(scores * scores, axis=0) - threshold
    sign = tl.where(label == 1, 1.0, -1.0)
    loss = tl.log(1.0 + tl.exp(-sign * margin))
    return loss, -sign * 2.0 * scores / (1.0 + tl.exp(sign * margin)), (margin > 0.0) == (label == 1)


@triton.jit
def _shifted(raw, shift, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    return raw + tl.load(shift + index * stride, mask=index < CLASSES, other=0.0)


@triton.jit
def _shifted_backward(  # type: ignore[no-untyped-def]
    scores_grad, raw, shift, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    return scores_grad, scores_grad


def test_another_loss_and_an_additive_modulation(kernel_device: str) -> None:
    head = make_head(HeadPieces(scores=_shifted, scores_backward=_shifted_backward, loss=_squared_error))
    latents, labels, basis, shift = (_move(t, kernel_device) for t in _case(6, 20, 7, "vector"))
    assert latents is not None
    assert labels is not None
    assert basis is not None
    assert shift is not None
    result = head(latents, labels, basis, shift, basis_gradient=True)
    leaves = [t.requires_grad_() for t in (latents, shift, basis)]
    scores = F.normalize(latents) @ basis.T + shift
    loss = (scores - F.one_hot(labels, 7)).square().sum(1).mean()
    grads = torch.autograd.grad(loss, leaves)
    for got, want in zip((result.latents_grad, result.modulation_grad, result.basis_grad), grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=float(want.abs().max()) * SINGLE)
    assert float(result.loss_sum) == pytest.approx(float(loss.detach()) * 6, rel=SINGLE)


def test_a_rule_without_classes(kernel_device: str) -> None:
    head = make_head(HeadPieces(loss=_goodness))
    latents = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)).to(kernel_device).requires_grad_()
    labels = (torch.arange(8) % 2).to(kernel_device)
    result = head(latents.detach(), labels, None, normalize=False, temperature=11.0)
    goodness = latents.square().sum(1) - 11.0
    loss = F.softplus(torch.where(labels == 1, -goodness, goodness)).mean()
    loss.backward()
    torch.testing.assert_close(result.latents_grad, latents.grad, rtol=1e-4, atol=1e-6)
    assert int(result.correct) == int(((goodness > 0) == (labels == 1)).sum())


def test_a_piece_must_be_a_jit_function() -> None:
    with pytest.raises(ValueError, match=r"piece 'loss' must be a @triton\.jit function"):
        HeadPieces(loss=F.cross_entropy)


def test_the_example_rule_matches_autograd() -> None:
    script = Path(__file__).parents[2] / "examples" / "triton_rule.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "largest error" in done.stdout


# What only a GPU can show


def _cuda_case(batch: int, dim: int, rows: int, kind: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    latents, labels, basis, modulation = (
        _move(t, "cuda") for t in _case(batch, dim, rows, kind, classes=10, seed=seed)
    )
    assert latents is not None
    assert labels is not None
    assert basis is not None
    assert modulation is not None
    return latents, labels, basis, modulation


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return torch.equal(a, b) if a is not None and b is not None else a is b


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("batch", [64, 2048])
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_bitwise_repeatable(batch: int, kind: str) -> None:
    case = _cuda_case(batch, 512, 10, kind)
    first = local_head(*case, basis_gradient=True)
    for _ in range(100):
        again = local_head(*case, basis_gradient=True)
        assert all(_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_graphs_replay_the_eager_result_even_side_by_side() -> None:
    """Two graphs captured on one stream and replayed on two at once: each must have an arrival counter of its own."""
    cases = [_cuda_case(64, 512, 10, "matrix", seed) for seed in (0, 1)]
    expected = [local_head(*case) for case in cases]
    graphs, results = [], []
    for case in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append(local_head(*case))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(200):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert all(_equal(a, b) for a, b in zip(result, want, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["none", "matrix"])
def test_a_thousand_classes(kind: str) -> None:
    case = _case(64, 8192, 1000, kind, classes=1000)
    _check(case, "cuda", temperature=4.0, basis_gradient=True)
