"""Every task against a plain loop that knows nothing of this project, and equal on the engines of one process."""

import csv
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as truth
import torch
import torch.nn.functional as F
from task_runs import BATCH, CASES, EPOCHS, SEED, Quantile, train
from torch import Tensor, nn

from unlocked.data import epoch_order
from unlocked.kernels.reference import make_basis
from unlocked.runtime import Streams
from unlocked.runtime.metrics.csv_file import CsvFile
from unlocked.workers.stage import Stage


def as_targets(name: str, data: Any) -> Tensor:
    if name == "tokens":
        ids, mask = data["input_ids"], data["attention_mask"]
        following = ids.masked_fill(mask == 0, -100)[:, 1:]
        return torch.cat([following, torch.full((len(ids), 1), -100)], 1)
    return data["labels"] if isinstance(data, dict) else data[1]


def loss_of(name: str, scores: Tensor, targets: Tensor) -> Tensor:
    """Of a network's output [B, ...]."""
    if name == "regression":
        return (scores - targets).square().mean()
    if name == "multi-label":
        return F.binary_cross_entropy_with_logits(scores, targets.float())
    if name == "own":
        return Quantile().loss(scores, targets)
    return F.cross_entropy(scores.transpose(1, 2) if name == "tokens" else scores, targets)


def local_loss(name: str, activations: Tensor, targets: Tensor, scores: int) -> Tensor:
    """LLS's, written anew: normalised latents on the fixed basis, temperature 0.3."""
    if name == "tokens":
        latents, targets = activations.flatten(0, 1), targets.flatten()
    elif name == "segmentation":
        latents = activations.permute(0, 2, 3, 1).flatten(0, 2)
        step = targets.shape[1] // activations.shape[2]
        targets = targets[:, ::step, ::step].flatten()
    elif activations.dim() == 3:
        latents = activations.mean(1)  # the mean token
    else:
        latents = activations
    latents = latents / latents.norm(dim=1, keepdim=True).clamp_min(1e-12)
    found = latents @ make_basis(scores, latents.shape[1], "cosine").T / 0.3
    return F.cross_entropy(found, targets) if name == "tokens" else loss_of(name, found, targets)


def forward(block: Any, x: Tensor, data: Any, rows: Any) -> Tensor:
    needs = isinstance(data, dict) and "attention" in str(type(getattr(block, "body", block))).lower()
    needs = needs or type(getattr(block, "body", block)).__name__ == "MeanOfMasked"
    y: Tensor = block(x, attention_mask=data["attention_mask"][rows]) if needs else block(x)
    return y


def plain_loop(name: str) -> list[nn.Module]:
    case = CASES[name]
    blocks, data, targets = case.network(), case.train, as_targets(name, case.train)
    samples = data["input_ids"] if isinstance(data, dict) else data[0]
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.05, momentum=0.9) for block in blocks]
    scores = {"tokens": 17, "padded sequences": 3, "regression": 2, "multi-label": 3, "segmentation": 3, "own": 1}
    for epoch in range(EPOCHS):
        for rows in epoch_order(len(samples), SEED, epoch, torch.device("cpu")).split(BATCH):
            x = samples[rows]
            for block, optimizer in zip(blocks, optimizers, strict=True):
                y = forward(block, x.detach(), data, rows)
                last = block is blocks[-1]
                own = targets[rows]
                loss = loss_of(name, y, own) if last else local_loss(name, y, own, scores[name])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                x = y
    return blocks


@torch.no_grad()
def expected_figures(name: str, blocks: list[nn.Module]) -> dict[str, float]:
    """Over the whole test set at once."""
    data = CASES[name].test
    x, everything = data["input_ids"] if isinstance(data, dict) else data[0], slice(None)
    for block in blocks:
        x = forward(block, x, data, everything)
    y = as_targets(name, data)
    found = {"loss": float(loss_of(name, x, y))}
    if name == "tokens":
        counts = y != -100
        found["acc1"] = 100 * float((x.argmax(2) == y)[counts].double().mean())
        found["perplexity"] = float(torch.tensor(found["loss"]).double().exp())
    elif name == "padded sequences":
        found["acc1"] = 100 * truth.accuracy_score(y, x.argmax(1))
    elif name == "regression":
        found |= {"rmse": found["loss"] ** 0.5, "mae": truth.mean_absolute_error(y, x), "r2": truth.r2_score(y, x)}
    elif name == "multi-label":
        found["acc1"] = 100 * float(((x > 0) == y).double().mean())
        for kind in ("micro", "macro"):
            found[f"{kind}_f1"] = 100 * truth.f1_score(y, x > 0, average=kind)
    elif name == "segmentation":
        counts = y != -100
        taken, right = x.argmax(1)[counts], y[counts]
        found["acc1"] = 100 * truth.accuracy_score(right, taken)
        found["mean_iou"] = 100 * truth.jaccard_score(right, taken, average="macro")
    else:
        found["below"] = float((y < x[:, 0]).double().mean())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_the_plain_loop(name: str) -> None:
    trainer, result = train(name, "sequential")
    blocks = plain_loop(name)
    for ours, theirs in zip(trainer.model, blocks, strict=True):
        for (key, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}")
    own = list(trainer.model)
    last = result.epochs[-1]
    figures = {"loss": last.eval_loss, "acc1": last.eval_acc1, **dict(last.eval_figures)}
    expected = expected_figures(name, own)
    assert {key: value for key, value in figures.items() if value is not None} == pytest.approx(expected, rel=1e-6)
    evaluated = trainer.evaluate(CASES[name].test)
    again = {"loss": evaluated.loss, "acc1": evaluated.acc1, **evaluated.figures}
    assert {key: value for key, value in again.items() if value is not None} == pytest.approx(expected, rel=1e-6)
    assert result.test_figures == dict(last.eval_figures)


@pytest.mark.parametrize("name", CASES)
def test_the_engines_of_one_process_agree(name: str) -> None:
    _, expected = train(name, "sequential")
    for stages in (2, 4):
        _, found = train(name, Streams(stages=stages))
        assert found.weights_sha256 == expected.weights_sha256
        assert [e.eval_figures for e in found.epochs] == [e.eval_figures for e in expected.epochs]
        assert [e.local_losses for e in found.epochs] == [e.local_losses for e in expected.epochs]


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_the_networks_outputs(name: str) -> None:
    trainer, _ = train(name, "sequential")
    data = CASES[name].test
    x = data["input_ids"] if isinstance(data, dict) else data[0]
    with torch.no_grad():
        for block in trainer.model:
            x = forward(block, x, data, slice(None))
    found = trainer.predict(data if isinstance(data, dict) else data[0])
    torch.testing.assert_close(found, x, atol=1e-6, rtol=1e-5)


class OwnNumbers(Quantile):
    """Its figures are of a type of one's own choice."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def figures(self, sums: Any, count: float) -> Any:
        return {name: self._kind(value / count) for name, value in sums.items()}


@pytest.mark.parametrize("kind", [np.float64, np.float32, torch.tensor, lambda value: np.array(value), Fraction])
def test_a_figure_may_be_a_number_of_any_kind(kind: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(CASES, "own", replace(CASES["own"], task=OwnNumbers(kind)))  # type: ignore[arg-type]
    trainer, result = train("own", "sequential", sinks=[CsvFile(tmp_path / "figures.csv")])
    data, targets = CASES["own"].test
    below = (targets < trainer.predict(data)[:, 0]).double().mean()
    told = dict(result.epochs[-1].eval_figures)
    assert type(told["below"]) is float
    assert told["below"] == pytest.approx(float(below), abs=1e-7)
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert float(rows[-1]["eval_below"]) == told["below"]


@pytest.mark.parametrize("kind", [str, lambda value: None, lambda value: [value], lambda value: torch.ones(1), complex])
def test_a_figure_that_is_no_number_is_one_line_before_the_first_step(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "own", replace(CASES["own"], task=OwnNumbers(kind)))  # type: ignore[arg-type]
    monkeypatch.setattr(Stage, "update", lambda *_, **__: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match=r"figure below of the task quantile is no number but .*; give a") as e:
        train("own", "sequential")
    assert "\n" not in str(e.value)
