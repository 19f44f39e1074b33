"""Cross-entropy in pieces against torch's own in float64, and that scores are never whole."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from torch import Tensor, nn

from unlocked import Trainer
from unlocked.kernels import vocabulary
from unlocked.kernels.vocabulary import linear_cross_entropy, pieces
from unlocked.models import Block
from unlocked.rules import DGL, LLS, LLS_M

ROWS, WIDTH, TOKENS = 37, 8, 50


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)
    targets = torch.randint(TOKENS, (ROWS,), generator=generator)
    targets[::5] = -100
    return latents, weight, torch.randn(TOKENS, generator=generator), targets


@pytest.mark.parametrize("piece", [TOKENS, 4 * TOKENS, 1 << 22])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_gradients_and_hits_are_torchs(piece: int, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "PIECE", piece)
    latents, weight, bias, targets = case()
    given = [one.clone().requires_grad_() for one in (latents, weight, bias)]
    hits = torch.zeros((), dtype=torch.float64)
    loss = linear_cross_entropy(given[0], given[1], targets, bias=given[2], label_smoothing=smoothing, hits=hits)
    (3 * loss).backward()
    wide = [one.double().requires_grad_() for one in (latents, weight, bias)]
    scores = F.linear(*wide)
    expected = F.cross_entropy(scores, targets, label_smoothing=smoothing)
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(given, wide, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, atol=1e-6, rtol=1e-4)
    assert hits == (scores.argmax(1) == targets).sum()


def test_what_needs_no_gradient_gets_none() -> None:
    latents, weight, _, targets = case()
    latents.requires_grad_()
    linear_cross_entropy(latents, weight, targets).backward()
    assert latents.grad is not None
    assert weight.grad is None


def test_no_row_counts() -> None:
    latents, weight, _, targets = case()
    latents.requires_grad_()
    loss = linear_cross_entropy(latents, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert not latents.grad.any()


def test_a_score_that_is_not_finite_is_not_hidden() -> None:
    latents, weight, _, targets = case()
    latents[1, 0] = float("nan")
    assert linear_cross_entropy(latents, weight, targets).isnan()


def test_scores_are_never_whole_in_training_or_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run of two layers, local head and output: B T V would be 8 x 16 x 400."""
    monkeypatch.setattr(vocabulary, "PIECE", 16 * 400)
    tokens = torch.randint(400, (16, 16), generator=torch.Generator().manual_seed(1))
    for rule in (LLS(temperature=0.3), LLS_M(), DGL, "BP"):
        torch.manual_seed(0)
        network = [nn.Embedding(400, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 400)]
        network[-1] = nn.Sequential(network[-1])
        trainer = Trainer(network, rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1), kernels="torch")
        with Largest() as largest:
            trainer.fit(tokens, epochs=1, batch_size=8, eval_data=tokens)
        whole = 8 * 16 * 400
        assert 16 * 400 <= largest.most < whole / 2, (rule, largest.most)


class Masked(nn.Module):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x * attention_mask[..., None]


@pytest.mark.parametrize("rule", ["BP", LLS(temperature=0.3)])
def test_a_head_is_found_inside_of_what_lies_around_it(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layers in one block, and layers that read a mask: in pieces, and what whole scores give."""
    tokens = torch.randint(400, (16, 16), generator=torch.Generator().manual_seed(1))
    data = {"input_ids": tokens, "attention_mask": (torch.arange(16) < 12).expand(16, 16).long()}

    def losses() -> list[float]:
        torch.manual_seed(0)
        inner = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 400))
        network = [nn.Embedding(400, 8), Block("masked", Masked()), Block("last", nn.Sequential(nn.Tanh(), inner))]
        trainer = Trainer(network, rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1), kernels="torch")
        result = trainer.fit(data, epochs=2, batch_size=8, eval_data=data)
        return [
            loss for epoch in result.epochs for loss in (epoch.eval_loss or 0.0, *dict(epoch.local_losses).values())
        ]

    monkeypatch.setattr(vocabulary, "PIECE", 16 * 400)
    with Largest() as largest:
        found = losses()
    assert largest.most < 8 * 16 * 400 / 2
    monkeypatch.setattr("unlocked.runtime.network.head_of", lambda block: None)
    assert found == pytest.approx(losses(), rel=1e-5)


def test_pieces_cover_all_rows() -> None:
    assert [(one.start, one.stop) for one in pieces(5, vocabulary.PIECE // 2)] == [(0, 2), (2, 4), (4, 5)]
    assert [(one.start, one.stop) for one in pieces(2, 2 * vocabulary.PIECE)] == [(0, 1), (1, 2)]
