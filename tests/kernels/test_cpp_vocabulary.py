"""The C++ kernel from scores to their gradient, against float64 autograd on whole scores and against the reference."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels import cpp, vocabulary
from unlocked.kernels.vocabulary import Before, linear_cross_entropy, linear_loss, score_gradients, using

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason=cpp.unavailable("cpu"))
ROWS = 9


def case(classes: int, pair: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Scores, those before, targets and shares; the third row does not count, the first is right."""
    generator = torch.Generator().manual_seed(classes)
    scores, before = (4 * torch.randn(ROWS, classes, generator=generator) for _ in range(2))
    targets = torch.randint(classes, (ROWS,), generator=generator)
    targets[0], targets[3] = scores[0].argmax(), -100
    shares = torch.rand(ROWS, generator=generator) * (targets != -100)
    return scores, before if pair else None, targets, shares


def whole(scores: Tensor, before: Tensor | None, targets: Tensor, alpha: float, smoothing: float) -> Tensor:
    """Each row's loss [R], term by term; 0 where a row does not count."""
    loss = F.cross_entropy(scores, targets, reduction="none", label_smoothing=smoothing)
    if before is None:
        return loss
    p, q = scores.softmax(1), before.softmax(1)
    apart = (p * (p / q).log()).sum(1)
    return (alpha * loss + (1 - alpha) * apart).where(targets != -100, 0)


@pytest.mark.parametrize("classes", [1, 5, 16, 40, 1024, 4001])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("pair", [False, True])
def test_losses_hits_and_gradients_are_autograds(classes: int, smoothing: float, pair: bool) -> None:
    scores, before, targets, shares = case(classes, pair)
    wide = scores.double().requires_grad_()
    losses = whole(wide, None if before is None else before.double(), targets, 0.6, smoothing)
    (expected,) = torch.autograd.grad((losses * shares.double()).sum(), wide)
    hits = (scores.argmax(1) == targets).sum()
    kept = None if before is None else before.clone()
    for compute in (cpp.score_gradients, score_gradients):
        found, sums = scores.clone(), torch.zeros(2, dtype=torch.float64)
        options: dict[str, Any] = {"before": before, "alpha": 0.6, "label_smoothing": smoothing, "ignore_index": -100}
        compute(scores, targets, shares, torch.zeros(2, dtype=torch.float64), out=None, **options)
        compute(found, targets, shares, sums, out=found, **options)
        torch.testing.assert_close(sums, torch.stack([losses.detach().sum(), hits.double()]), atol=2e-5, rtol=1e-6)
        torch.testing.assert_close(found.double(), expected, atol=2e-7, rtol=2e-5)
        torch.testing.assert_close(scores, case(classes, pair)[0], atol=0, rtol=0)
    assert before is None or torch.equal(before, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    found = []
    before_threads = torch.get_num_threads()
    for count in (1, threads):
        scores, before, targets, shares = case(1000, True)
        sums = torch.zeros(2, dtype=torch.float64)
        torch.set_num_threads(count)
        cpp.score_gradients(scores, targets, shares, sums, before=before, alpha=0.7, ignore_index=-100, out=scores)
        torch.set_num_threads(before_threads)
        found.append((scores, sums))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    scores = torch.tensor([[3e4, -3e4, 0.0], [-200.0, -300.0, -100.0], [88.0, 87.5, -1e30]])
    targets, shares = torch.tensor([1, 2, 0]), torch.ones(3)
    wide = scores.double().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="sum")
    expected.backward()
    sums = torch.zeros(1, dtype=torch.float64)
    cpp.score_gradients(scores, targets, shares, sums, ignore_index=-100, out=scores)
    torch.testing.assert_close(sums[0], expected.detach())
    assert wide.grad is not None
    torch.testing.assert_close(scores.double(), wide.grad, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 20])
def test_what_is_no_number_is_no_hit_and_is_told(bad: float, place: int) -> None:
    scores = torch.zeros(2, 21)
    scores[1, place] = bad
    sums = torch.zeros(2, dtype=torch.float64)
    cpp.score_gradients(scores, torch.tensor([3, place]), torch.ones(2), sums, ignore_index=-100, out=None)
    assert sums[0].isnan()
    assert sums[1] == 0


def test_a_target_beyond_the_classes_reads_nothing() -> None:
    sums = torch.zeros(1, dtype=torch.float64)
    cpp.score_gradients(torch.zeros(1, 4), torch.tensor([4]), torch.ones(1), sums, ignore_index=-100, out=None)
    assert sums.isnan()


@pytest.mark.parametrize("rows", [64, 200])
def test_losses_in_pieces_are_those_of_plain_pytorch(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a weight that trains, a bias, hits, and a head of its own for the layer before."""
    monkeypatch.setattr(vocabulary, "PIECE", 50 * rows)
    generator = torch.Generator().manual_seed(1)
    latents, before = (torch.randn(150, 8, generator=generator) for _ in range(2))
    weight, head = (torch.randn(50, 8, generator=generator) for _ in range(2))
    bias, targets = torch.randn(50, generator=generator), torch.randint(50, (150,), generator=generator)
    targets[::7] = -100
    found = []
    for backend, dtype in ((cpp, torch.float32), (None, torch.float64)):
        given = [one.to(dtype).clone().requires_grad_() for one in (latents, weight, bias)]
        hits = torch.zeros((), dtype=torch.float64)
        with using(backend):
            one = linear_cross_entropy(given[0], given[1], targets, bias=given[2], label_smoothing=0.1, hits=hits)
            apart = Before(before.to(dtype), head.to(dtype), None, 0.7)
            other = linear_loss(*given, targets, -100, hits, before=apart)
        grads = torch.autograd.grad(one + 3 * other, given)
        found.append([one.detach(), other.detach(), *grads, hits])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-6, rtol=1e-5)
    assert float(found[0][-1]) > 0
