"""ZeroLock's rule with a language model's own head: its formula by whole scores, and what is refused."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face_models import bert, gemma2, llama
from torch import Tensor, nn

from unlocked.models import frozen_head
from unlocked.rules import FrozenHeadConsistency, LayerInfo, LayerPass, OutputHead, Tokens

WIDTH, VOCABULARY, PLACES = 16, 40, 6


def info(index: int, width: int = WIDTH) -> LayerInfo:
    sizes = {"latent_size": 1, "hidden": 8, "reduced_rank": 4, "seed": 0, "layout": "tokens"}
    shape = (PLACES, width)
    return LayerInfo(name="chunk", index=index, activation_shape=shape, num_classes=VOCABULARY, task=Tokens(), **sizes)  # type: ignore[arg-type]


def one_pass(x: Tensor, activations: Tensor, labels: Tensor, head: OutputHead | None = None) -> LayerPass:
    return LayerPass(
        input=x,
        activations=activations,
        labels=labels,
        block=nn.Identity(),
        step=0,
        epoch=0,
        lr_factor=1.0,
        carried={},
        key=0,
        forward=nn.Identity(),
        head=head,
    )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("on_scores", [False, True])
def test_the_formula(index: int, on_scores: bool) -> None:
    head = frozen_head(llama())
    rule = FrozenHeadConsistency(
        info(index, VOCABULARY if on_scores else WIDTH), head=head, alpha=0.6, on_scores=on_scores
    )
    x, hidden = torch.randn(3, PLACES, WIDTH), torch.randn(3, PLACES, WIDTH)
    labels = torch.randint(VOCABULARY, (3, PLACES))
    labels[:, -1] = labels[0, 0] = -100
    activations = (head(hidden) if on_scores else hidden).clone().requires_grad_()
    own = activations if on_scores else head(activations)
    counts = labels != -100
    p, q = own[counts].log_softmax(1), head(x)[counts].log_softmax(1)
    expected = F.nll_loss(p, labels[counts])
    if index:
        expected = 0.6 * expected + 0.4 * (p.exp() * (p - q)).sum(1).mean()
    loss = rule.step(one_pass(x, activations, labels))
    torch.testing.assert_close(loss, expected)
    wanted, found = (torch.autograd.grad(one, activations)[0] for one in (expected, loss))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(rule.scores(activations), own.flatten(0, 1))


@pytest.mark.parametrize("index", [0, 1])
def test_an_output_head_of_its_own_gets_gradients(index: int) -> None:
    """In pieces: the output layer's weight trains, while the layer before is read out by the frozen one."""
    head = frozen_head(llama())
    rule = FrozenHeadConsistency(info(index), head=head, alpha=0.6, on_scores=True)
    x, hidden = torch.randn(3, PLACES, WIDTH), torch.randn(3, PLACES, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (3, PLACES))
    labels[:, -1] = -100
    hits = torch.zeros((), dtype=torch.float64)
    loss = rule.step(one_pass(x, hidden, labels, OutputHead(weight, None, hits)))
    counts = labels != -100
    scores = F.linear(hidden, weight)[counts]
    p, q = scores.log_softmax(1), head(x)[counts].log_softmax(1)
    expected = F.nll_loss(p, labels[counts])
    if index:
        expected = 0.6 * expected + 0.4 * (p.exp() * (p - q)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (loss, expected)), strict=True):
        torch.testing.assert_close(found, wanted)
    assert hits == (scores.argmax(1) == labels[counts]).sum()


def test_the_head_is_a_frozen_copy() -> None:
    network = llama()
    head = frozen_head(network)
    x = torch.randn(2, PLACES, WIDTH)
    expected = network.lm_head(network.model.norm(x))
    assert torch.equal(head(x), expected)
    with torch.no_grad():
        network.lm_head.weight.zero_()
    assert torch.equal(head(x), expected)
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert sum(parameter.numel() for parameter in head.parameters()) == WIDTH + VOCABULARY * WIDTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hand_on": "logits"}, 'hand_on is \'logits\'; valid: "hidden", "scores"'),
        ({"alpha": 0.0}, "alpha is 0.0; it must lie in (0, 1]"),
        (
            {"head": nn.Linear(WIDTH, VOCABULARY)},
            "head is a Linear; give what unlocked.models.frozen_head(model) makes",
        ),
        ({"head": "trained"}, "head has weights that would be trained"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    given = {"head": frozen_head(llama()), **options}
    if given["head"] == "trained":
        given["head"] = frozen_head(llama()).requires_grad_(True)
    with pytest.raises(ValueError, match=re.escape(message)):
        FrozenHeadConsistency(info(1), **given)


@pytest.mark.parametrize("make", [bert, lambda: gemma2(final_logit_softcapping=0.01)])
def test_a_network_without_such_a_head(make: Any) -> None:
    with pytest.raises(ValueError, match="has no head that is one linear map"):
        frozen_head(make())
