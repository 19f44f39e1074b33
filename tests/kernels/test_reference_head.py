"""The reference head against float64 autograd of the eight rules, written as the rules' table has them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels.reference import HeadResult, local_head, make_basis

BATCH, DIM, CLASSES, REDUCED, HIDDEN = 7, 24, 5, 3, 40
# Both sides are float64 and sum a few dozen terms: a few hundred units of 2**-53 at most.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
Scores = Callable[[Tensor, dict[str, Tensor]], Tensor]


def _randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _pool(matrix: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d(matrix[None], DIM)[0]


def _basis(rows: int) -> Tensor:
    return make_basis(rows, DIM).double()


def _lls(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.normalize(z) @ _basis(CLASSES).T


def _lls_m(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return p["m"] * (F.normalize(z) @ _basis(CLASSES).T)


def _lls_mxm(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return (F.normalize(z) @ _basis(CLASSES).T) @ p["m"]


def _lls_mxm_reduced(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return (F.normalize(z) @ _basis(REDUCED).T) @ p["m"]


def _lls_random(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return z @ _pool(p["fixed"]).T


def _lls_m_random(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return z @ _pool(p["m"] * p["fixed"]).T


def _lls_mxm_random(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return z @ _pool(p["m"] @ p["fixed"]).T


def _local_losses(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return z @ _pool(p["r"]).T


# rule: (scores, shape of m, the head's arguments). The fixed matrix pools to the basis: pooling is linear in the rows.
RULES: dict[str, tuple[Scores, tuple[int, ...] | None, Callable[[dict[str, Tensor]], dict[str, Any]]]] = {
    "LLS": (_lls, None, lambda p: {"basis": _basis(CLASSES)}),
    "LLS_M": (_lls_m, (CLASSES,), lambda p: {"basis": _basis(CLASSES), "modulation": p["m"]}),
    "LLS_MxM": (_lls_mxm, (CLASSES, CLASSES), lambda p: {"basis": _basis(CLASSES), "modulation": p["m"]}),
    "LLS_MxM_reduced": (
        _lls_mxm_reduced,
        (REDUCED, CLASSES),
        lambda p: {"basis": _basis(REDUCED), "modulation": p["m"]},
    ),
    "LLS_Random": (_lls_random, None, lambda p: {"basis": _pool(p["fixed"]), "normalize": False}),
    "LLS_M_Random": (
        _lls_m_random,
        (CLASSES, 1),
        lambda p: {"basis": _pool(p["fixed"]), "modulation": p["m"][:, 0], "normalize": False},
    ),
    "LLS_MxM_Random": (
        _lls_mxm_random,
        (CLASSES, CLASSES),
        lambda p: {"basis": _pool(p["fixed"]), "modulation": p["m"].T, "normalize": False},
    ),
    "LocalLosses": (
        _local_losses,
        None,
        lambda p: {"basis": _pool(p["r"]), "normalize": False, "basis_gradient": True},
    ),
}


@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (0.25, 0.1)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_matches_autograd(name: str, temperature: float, smoothing: float) -> None:
    scores, shape, call = RULES[name]
    leaves = {"fixed": _randn(CLASSES, HIDDEN, seed=1, scale=0.1)}
    if shape:
        leaves["m"] = _randn(*shape, seed=2).requires_grad_()
    if name == "LocalLosses":
        leaves["r"] = _randn(CLASSES, HIDDEN, seed=3, scale=0.1).requires_grad_()
    z = _randn(BATCH, DIM, seed=4).requires_grad_()
    labels = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    out = scores(z, leaves)
    loss = F.cross_entropy(out / temperature, labels, label_smoothing=smoothing)
    trained = [leaf for leaf in leaves.values() if leaf.requires_grad]
    z_grad, *trained_grads = torch.autograd.grad(loss, [z, *trained], retain_graph=True)

    plain = {key: leaf.detach() for key, leaf in leaves.items()}
    arguments = call(plain)
    result = local_head(z.detach(), labels, temperature=temperature, label_smoothing=smoothing, **arguments)
    torch.testing.assert_close(result.loss_sum, loss.detach() * BATCH, **EXACT)
    assert int(result.correct) == int((out.argmax(1) == labels).sum())
    torch.testing.assert_close(result.latents_grad, z_grad, **EXACT)
    if shape:
        assert result.modulation_grad is not None
        grad = result.modulation_grad.T if name == "LLS_MxM_Random" else result.modulation_grad
        torch.testing.assert_close(grad.reshape(shape), trained_grads[0], **EXACT)
    if name == "LocalLosses":
        r = plain["r"].requires_grad_()
        (r_grad,) = torch.autograd.grad(_pool(r), r, result.basis_grad)
        torch.testing.assert_close(r_grad, trained_grads[0], **EXACT)


def test_no_basis_is_plain_cross_entropy() -> None:
    logits = _randn(BATCH, CLASSES, seed=5).requires_grad_()
    labels = torch.arange(BATCH) % CLASSES
    loss = F.cross_entropy(logits, labels, label_smoothing=0.2)
    loss.backward()
    result = local_head(logits.detach(), labels, None, normalize=False, label_smoothing=0.2)
    torch.testing.assert_close(result.loss_sum, loss.detach() * BATCH, **EXACT)
    torch.testing.assert_close(result.latents_grad, logits.grad, **EXACT)
    assert result.modulation_grad is None
    assert result.basis_grad is None


def test_gradients_match_finite_differences() -> None:
    """Independent of autograd: central differences of the head's own loss, error about step**2 + 1e-16 / step."""
    z, basis, m = _randn(3, 8, seed=6), _randn(4, 8, seed=7), _randn(4, 5, seed=8)
    labels = torch.tensor([4, 0, 2])

    def loss(z: Tensor, basis: Tensor, m: Tensor) -> float:
        return float(local_head(z, labels, basis, m, temperature=0.5, label_smoothing=0.1).loss_sum) / 3

    result = local_head(z, labels, basis, m, temperature=0.5, label_smoothing=0.1, basis_gradient=True)
    for which, grad in enumerate((result.latents_grad, result.basis_grad, result.modulation_grad)):
        assert grad is not None
        numeric = torch.empty_like(grad)
        for index in range(grad.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [z.clone(), basis.clone(), m.clone()]
                moved[which].view(-1)[index] += step
                ends.append(loss(*moved))
            numeric.view(-1)[index] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)


def test_zero_latents_have_the_gradient_of_normalize() -> None:
    z = _randn(3, DIM, seed=9)
    z[1] = 0
    z[2] *= 1e-14  # below the clamp of the norm, but not zero
    z.requires_grad_()
    labels = torch.tensor([0, 1, 2])
    F.cross_entropy(F.normalize(z) @ _basis(CLASSES).T, labels).backward()
    result = local_head(z.detach(), labels, _basis(CLASSES))
    assert z.grad is not None
    assert z.grad[1].abs().max() > 1e9  # only the division by 1e-12 is left
    torch.testing.assert_close(result.latents_grad, z.grad, **EXACT)


def test_float32_head_is_close_to_float64() -> None:
    z, labels = _randn(BATCH, DIM, seed=10), torch.arange(BATCH) % CLASSES
    m = _randn(CLASSES, seed=11)
    exact = local_head(z, labels, _basis(CLASSES), m)
    single = local_head(z.float(), labels, make_basis(CLASSES, DIM), m.float())
    assert single.latents_grad.dtype == torch.float32
    # Inputs are rounded to 2**-24 and sums of 24 terms lose about as much again.
    torch.testing.assert_close(single.latents_grad.double(), exact.latents_grad, rtol=1e-5, atol=1e-7)


def test_first_of_equal_scores_counts_and_totals_add_up() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    labels = torch.tensor([0, 1, 2])
    totals = torch.tensor([10.0, 5.0], dtype=torch.float64)
    result = local_head(logits, labels, None, normalize=False, totals=totals)
    assert int(result.correct) == 2
    assert totals.tolist() == [10.0 + float(result.loss_sum), 7.0]


@pytest.mark.parametrize("classes", [1, 5, 6, 40])
def test_a_third_total_counts_labels_among_the_first_five(classes: int) -> None:
    """Against a stable descending sort, with many equal scores."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(4, (60, classes), generator=generator).double()
    labels = torch.randint(classes, (60,), generator=generator)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    totals = torch.zeros(3, dtype=torch.float64)
    result = local_head(logits, labels, None, normalize=False, totals=totals)
    assert totals[2] == (order[:, :5] == labels[:, None]).any(1).sum()
    assert totals[1] == result.correct == (order[:, 0] == labels).sum()


def _typed(result: HeadResult) -> tuple[torch.dtype, ...]:
    return result.loss_sum.dtype, result.correct.dtype, result.latents_grad.dtype


def test_half_precision_latents_get_a_gradient_of_their_dtype() -> None:
    labels = torch.tensor([0, 1])
    result = local_head(torch.randn(2, DIM).bfloat16(), labels, make_basis(CLASSES, DIM))
    assert _typed(result) == (torch.float32, torch.int64, torch.bfloat16)
