"""Heads of pieces for rules outside the LLS family, against autograd of the rules themselves in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from unlocked.kernels import reference
from unlocked.kernels.triton.rule_heads import (
    centre_arguments,
    centre_gradient,
    classifier_head,
    distance_head,
    projection_head,
)
from unlocked.rules import DistanceForward, LayerInfo, LocalRule, MonoForward, PredictiveSimilarity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIM, CLASSES, BATCH = 24, 5, 9
LAYER = LayerInfo(
    name="linear",
    index=1,
    activation_shape=(DIM,),
    num_classes=CLASSES,
    latent_size=DIM,
    hidden=8,
    reduced_rank=3,
    seed=7,
)


def case() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(BATCH, DIM, generator=generator)
    latents[0] *= 30  # a row that is sure of some class
    return latents, torch.randint(CLASSES, (BATCH,), generator=generator)


def truth(rule: LocalRule, latents: Tensor, labels: Tensor) -> tuple[float, Tensor, dict[str, Tensor], int]:
    """(sum of losses, gradients of latents and parameters, hits), in float64."""
    a = latents.double().requires_grad_()
    hits = int((rule.double().scores(a).argmax(1) == labels).sum())  # before running means move
    loss = rule(a, labels)
    loss.backward()
    assert a.grad is not None
    grads = {name: p.grad for name, p in rule.named_parameters() if p.grad is not None}
    return float(loss.detach()) * BATCH, a.grad, grads, hits


def check(result: Any, expected: tuple[float, Tensor, dict[str, Tensor], int], parameters: dict[str, Tensor]) -> None:
    loss_sum, latents_grad, grads, hits = expected
    assert float(result.loss_sum) == pytest.approx(loss_sum, rel=1e-5, abs=1e-6)
    assert int(result.correct) == hits
    torch.testing.assert_close(result.latents_grad.cpu().double(), latents_grad, rtol=1e-4, atol=1e-7)
    assert parameters.keys() == grads.keys()
    for name, grad in parameters.items():
        torch.testing.assert_close(grad.cpu().double(), grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mono_forward() -> None:
    latents, labels = case()
    rule = MonoForward(LAYER)
    basis = rule.projection.detach().clone().to(DEVICE)
    result = projection_head(latents.to(DEVICE), labels.to(DEVICE), basis, normalize=False, basis_gradient=True)
    check(result, truth(rule, latents, labels), {"projection": result.basis_grad})


def test_the_prediction_part_of_predictive_similarity() -> None:
    latents, labels = case()
    torch.manual_seed(0)
    rule = PredictiveSimilarity(LAYER, beta=0.0)
    torch.nn.init.normal_(rule.classifier.weight)
    weight, bias = (p.detach().clone().to(DEVICE) for p in (rule.classifier.weight, rule.classifier.bias))
    result = classifier_head(latents.to(DEVICE), labels.to(DEVICE), weight, bias, normalize=False, basis_gradient=True)
    rule.similarity.requires_grad_(False)
    found = {"classifier.weight": result.basis_grad, "classifier.bias": result.modulation_grad}
    check(result, truth(rule, latents, labels), found)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("margin", "temperature"), [(1.0, 0.5), (0.0, 2.0), (-3.0, 0.1)])
def test_distance_forward(trained: bool, margin: float, temperature: float) -> None:
    latents, labels = case()
    options = {"margin": margin, "temperature": temperature}
    rule = DistanceForward(LAYER, centres="trained" if trained else "means", **options)  # type: ignore[arg-type]
    centres = rule.centres.detach().clone().to(DEVICE)
    basis, modulation = centre_arguments(centres)
    result = distance_head(
        latents.to(DEVICE),
        labels.to(DEVICE),
        basis,
        modulation,
        temperature=temperature,
        label_smoothing=margin,
        basis_gradient=trained,
    )
    found = {}
    if trained:
        found = {"centres": centre_gradient(centres, result.basis_grad, result.modulation_grad)}
    check(result, truth(rule, latents, labels), found)


def test_mono_forward_takes_the_head_where_its_latents_are_all_activations() -> None:
    assert MonoForward(LAYER).head_arguments() is not None
    assert MonoForward(replace(LAYER, latent_size=DIM // 2)).head_arguments() is None
    rule = MonoForward(LAYER)
    arguments = rule.head_arguments()
    assert arguments is not None
    latents, labels = case()
    result = reference.local_head(
        latents.double(), labels, **arguments._replace(basis=rule.double().projection)._asdict()
    )
    loss = F.cross_entropy(latents.double() @ rule.projection.T, labels)
    (grad,) = torch.autograd.grad(loss, rule.projection)
    (found,) = rule.head_gradients(result)
    torch.testing.assert_close(found, grad)
