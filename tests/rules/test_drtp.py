"""DRTP against its formula written out in numpy: the labels' projection is the error at the layer's activations."""

from dataclasses import replace
from functools import partial
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from unlocked.models import Block
from unlocked.rules import DRTP, OTHER_RULES, RULES, TRAINING_MODES, LayerInfo, get_rule
from unlocked.workers.layer import Layer

LAYER = LayerInfo(
    name="conv", index=2, activation_shape=(6, 4, 4), num_classes=5, latent_size=2, hidden=40, reduced_rank=3, seed=7
)
FLAT = replace(LAYER, activation_shape=(11,), latent_size=11)
TOKENS = replace(LAYER, activation_shape=(3, 8))
EXACT = {"rtol": 1e-12, "atol": 1e-14}


def _case(layer: LayerInfo) -> tuple[DRTP, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    activations = torch.randn(9, *layer.activation_shape, dtype=torch.float64, generator=generator)
    return DRTP(layer).double(), activations.requires_grad_(), torch.randint(0, 5, (9,), generator=generator)


@pytest.mark.parametrize("layer", [LAYER, FLAT, TOKENS], ids=["images", "flat", "tokens"])
def test_the_gradient_is_the_projected_labels(layer: LayerInfo) -> None:
    rule, activations, labels = _case(layer)
    loss = rule(activations, labels)
    (grad,) = torch.autograd.grad(loss, activations)
    one_hot = np.eye(5)[labels.numpy()]
    error = one_hot @ rule.projection.numpy()  # [B, features]
    np.testing.assert_allclose(grad.numpy(), error.reshape(grad.shape) / 9, rtol=1e-12)
    inner = (activations.detach().numpy().reshape(9, -1) * error).sum(1).mean()
    assert loss.item() == pytest.approx(inner, rel=1e-12)


def test_a_layers_step_is_the_published_one() -> None:
    """W <- W - lr (B^T y* . f'(z)) x^T, averaged over the batch, for a layer a = tanh(W x + b)."""
    block = Block("hidden", nn.Sequential(nn.Linear(7, 11), nn.Tanh())).double()
    linear = block.body[0]
    weight, bias = (p.detach().numpy().copy() for p in linear.parameters())
    rule, _, labels = _case(FLAT)
    layer = Layer(block, rule, FLAT, partial(torch.optim.SGD, lr=0.5), device=torch.device("cpu"))
    x = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    layer.forward(x)
    layer.update(labels)
    slope = 1 - np.tanh(x.numpy() @ weight.T + bias) ** 2
    delta = rule.projection.numpy()[labels.numpy()] * slope
    np.testing.assert_allclose(linear.weight.detach().numpy(), weight - 0.5 * delta.T @ x.numpy() / 9, **EXACT)
    np.testing.assert_allclose(linear.bias.detach().numpy(), bias - 0.5 * delta.mean(0), **EXACT)


def test_the_projection_is_hes_uniform_and_keyed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    projection = DRTP(replace(LAYER, activation_shape=(64, 8, 8))).projection
    assert torch.equal(torch.get_rng_state(), before)
    bound = sqrt(6 / 4096)
    assert float(projection.abs().max()) <= bound
    assert float(projection.mean()) == pytest.approx(0, abs=0.02 * bound)
    assert float(projection.std()) == pytest.approx(bound / sqrt(3), rel=0.02)
    once = DRTP(LAYER).projection
    assert torch.equal(DRTP(LAYER).projection, once)
    assert not torch.equal(DRTP(replace(LAYER, seed=8)).projection, once)
    assert not torch.equal(DRTP(replace(LAYER, index=3)).projection, once)


def test_nothing_of_it_is_trained_or_saved() -> None:
    rule = DRTP(LAYER)
    assert list(rule.parameters()) == []
    assert rule.state_dict() == {}


def test_names() -> None:
    assert (*RULES, *OTHER_RULES, "BP", "DFA") == TRAINING_MODES
    assert len(RULES) == 8
    for name in (*RULES, "DRTP"):
        rule = get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")(FLAT)
        assert rule(torch.randn(2, 11), torch.tensor([0, 4])).shape == ()
