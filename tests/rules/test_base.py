"""The interface of a rule: what it is told about its layer, the output layer's rule, and a rule of one's own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import local_head
from unlocked.rules import CrossEntropy, LayerInfo, LocalRule

LAYER = LayerInfo(
    name="conv", index=0, activation_shape=(6, 8, 8), num_classes=4, latent_size=2, hidden=40, reduced_rank=3, seed=7
)


@pytest.mark.parametrize(
    ("shape", "layout", "latent_size", "features", "latents"),
    [
        ((6, 8, 8), None, 2, 384, 24),
        ((30,), None, 12, 30, 12),
        ((5, 16), "tokens", 1, 80, 16),
        ((5, 16), "tokens", 2, 80, 32),
        ((5, 16), "channels_first", 1, 80, 5),
        ((5, 16), "channels_first", 3, 80, 15),
    ],
)
def test_sizes_of_a_layer(
    shape: tuple[int, ...], layout: str | None, latent_size: int, features: int, latents: int
) -> None:
    layer = replace(LAYER, activation_shape=shape, layout=layout, latent_size=latent_size)  # type: ignore[arg-type]
    assert (layer.num_features, layer.num_latents) == (features, latents)


def test_latents_of_what_nobody_knows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing tells .*\(5, 16\) are \(C, L\).*layout="):
        _ = replace(LAYER, activation_shape=(5, 16)).num_latents
    with pytest.raises(ValueError, match=r"not of \(6, 8, 8, 8\)"):
        _ = replace(LAYER, activation_shape=(6, 8, 8, 8)).num_latents


def test_a_layers_generator_is_fresh_each_time() -> None:
    first, second = (torch.randn(8, generator=LAYER.generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.randn(8, generator=replace(LAYER, index=1).generator()))


def test_the_output_rule_is_plain_cross_entropy() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (7,))
    rule = CrossEntropy(LAYER)
    loss = rule(logits, labels)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    arguments = rule.head_arguments()
    result = local_head(logits.detach(), labels, **arguments._asdict())
    torch.testing.assert_close(result.loss_sum / 7, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.latents_grad, expected, rtol=1e-12, atol=1e-15)
    assert rule.head_gradients(result) == []
    assert list(rule.parameters()) == []


class Prototype(LocalRule):
    """The rule in the documentation of `unlocked.rules.base`."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return -torch.cdist(activations.flatten(1), self.centres).log_softmax(1).gather(1, labels[:, None]).mean()


def test_a_rule_of_ones_own_needs_a_forward_only() -> None:
    rule = Prototype(LAYER)
    assert rule.head_arguments() is None  # so its layer trains through autograd
    loss = rule(torch.randn(3, 6, 8, 8), torch.tensor([0, 1, 3]))
    assert loss.shape == ()
    loss.backward()
    assert rule.centres.grad is not None


def test_the_base_has_no_loss() -> None:
    with pytest.raises(NotImplementedError):
        LocalRule()(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
