"""What is not a number is never a hit: not among the first, not among the first five, by no backend."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.kernels import cpp, reference
from unlocked.workers.layer import count_correct

BACKENDS: dict[str, Callable] = {"reference": reference.local_head}
if not cpp.unavailable("cpu"):
    BACKENDS["cpp"] = cpp.local_head


def with_bad_rows(rows: int, classes: int, bad: list[tuple[int, int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [rows, classes] whose label always comes first, but for the (row, class, value) that are put in."""
    labels = torch.arange(rows) % classes
    logits = torch.nn.functional.one_hot(labels, classes).float()
    for row, column, value in bad:
        logits[row % rows, column % classes] = value
    return logits, labels


BAD = st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([float("nan"), float("inf"), -float("nan")]))


@settings(max_examples=80)
@given(rows=st.integers(1, 9), classes=st.integers(2, 9), bad=st.lists(BAD, max_size=4))
def test_a_row_without_a_finite_loss_is_a_miss(rows: int, classes: int, bad: list[tuple[int, int, float]]) -> None:
    logits, labels = with_bad_rows(rows, classes, bad)
    sound = rows - len({row % rows for row, _, _ in bad})
    assert count_correct(logits, labels).tolist() == [sound, sound]
    for name, local_head in BACKENDS.items():
        totals = torch.zeros(3, dtype=torch.float64)
        options = {"normalize": False, "temperature": 1.0, "label_smoothing": 0.0, "basis_gradient": False}
        result = local_head(logits, labels, None, None, **options, totals=totals)
        assert totals[1:].tolist() == [sound, sound], name
        assert float(result.correct) == sound, name


def test_a_label_of_no_probability_is_a_miss() -> None:
    logits, labels = with_bad_rows(3, 3, [(1, 1, -float("inf"))])
    assert count_correct(logits, labels).tolist() == [2, 2], "though there are fewer than five classes"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_classes_out_of_question_have_no_part(name: str, temperature: float) -> None:
    """Logits masked with -inf, as autograd in float64 has them."""
    logits, labels = with_bad_rows(6, 5, [(0, 2, -float("inf")), (0, 3, -float("inf")), (4, 0, -float("inf"))])
    truth = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(truth / temperature, labels)
    loss.backward()
    totals = torch.zeros(3, dtype=torch.float64)
    result = BACKENDS[name](logits, labels, None, None, normalize=False, temperature=temperature, totals=totals)
    torch.testing.assert_close(result.loss_sum.double(), 6 * loss.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.latents_grad.double(), truth.grad, rtol=1e-5, atol=1e-7)
    assert totals[1:].tolist() == [6, 6]
