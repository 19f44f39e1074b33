"""Every rule's first steps against a twin in plain PyTorch, written from the rule's formula, in float64."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import Block
from unlocked.rules import (
    DGL,
    AugLocal,
    BarlowTwins,
    DistanceForward,
    ForwardForward,
    InfoPro,
    InfoProContrastive,
    LayerInfo,
    LocalRule,
    MonoForward,
    PredictiveSimilarity,
    Rule,
    SoftHebb,
    TaskAndConsistency,
    needs_pass,
)
from unlocked.runtime.network import optimizer_of
from unlocked.workers.layer import Layer
from unlocked.workers.pass_layer import PassLayer

LAYER = LayerInfo(
    name="conv",
    index=1,
    activation_shape=(4, 6, 6),
    num_classes=3,
    latent_size=2,
    hidden=8,
    reduced_rank=3,
    seed=7,
    following_shapes=((6, 3, 3), (5,)),
    input_shape=(2, 8, 8),
)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2, 2])
RATE = 0.1
Given = Mapping[str, Tensor]  # the rule's parameters and what arrives, by name
Twin = Callable[[Given, Tensor, Tensor], Tensor]  # (given, activations, labels) -> loss


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    return -torch.stack(
        [row[y] - torch.log(torch.exp(row).sum()) for row, y in zip(scores, labels, strict=True)]
    ).mean()


def pooled(a: Tensor) -> Tensor:
    """2 x 2 latents of [B, C, 6, 6]."""
    return a.reshape(len(a), a.shape[1], 2, 3, 2, 3).mean((3, 5)).flatten(1)


def linear(given: Given, name: str, x: Tensor) -> Tensor:
    return x @ given[f"{name}.weight"].T + given[f"{name}.bias"]


def mono_forward(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(torch.einsum("bchw,nchw->bn", a, given["projection"].reshape(3, 4, 6, 6)), labels)


def predictive_similarity(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    maps = F.conv2d(a, given["similarity.weight"], padding=1)
    deviation = ((maps - maps.mean((2, 3), keepdim=True)).square().sum((2, 3)) / 35 + 1e-8).sqrt()
    similar = torch.corrcoef(deviation) - torch.corrcoef(torch.eye(3, dtype=a.dtype)[labels])
    prediction = cross_entropy(linear(given, "classifier", pooled(a)), labels)
    return 0.01 * prediction + 0.99 * similar.square().sum() / len(a) ** 2


def normalised(given: Given, name: str, x: Tensor) -> Tensor:
    """Training-mode BatchNorm of [B, C, ...]."""
    over = [d for d in range(x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    scale, shift = (given[f"{name}.{n}"].reshape(shape) for n in ("weight", "bias"))
    centred = x - x.mean(over, keepdim=True)
    return centred / (centred.square().mean(over, keepdim=True) + 1e-5).sqrt() * scale + shift


def dgl(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    x = a.reshape(len(a), 4, 2, 3, 2, 3).mean((3, 5))  # a quarter of 6, rounded up, is 2
    for i in (1, 4, 7):
        x = torch.einsum("oc,bchw->bohw", given[f"network.{i}.weight"][:, :, 0, 0], x)
        x = normalised(given, f"network.{i + 1}", x).clamp_min(0)
    x = x.flatten(1)
    for i in (12, 15, 18):
        x = normalised(given, f"network.{i + 1}", x @ given[f"network.{i}.weight"].T).clamp_min(0)
    return cross_entropy(linear(given, "network.21", x), labels)


def aug_local(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    x = F.conv2d(a, given["network.0.0.weight"], stride=2, padding=1)  # to the next layer's (6, 3, 3)
    x = normalised(given, "network.0.1", x).clamp_min(0)
    x = linear(given, "network.1.1", x.flatten(1)).clamp_min(0)  # and on to the one after it, (5,)
    return cross_entropy(linear(given, "network.3", x), labels)


def forward_forward(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    g = a.square().sum((1, 2, 3)) / (4 * 6 * 6)
    right, first, second, _ = g.chunk(4)
    wrong = torch.maximum(first, second)
    return (torch.log(1 + torch.exp(1 - right)) + torch.log(1 + torch.exp(wrong - 1))).mean()


def task_and_consistency(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    p = torch.softmax(linear(given, "classifier", pooled(a)), 1)
    before = given["log_probabilities"].exp()
    task = -p[torch.arange(len(p)), labels].log().mean()
    return 0.7 * task + 0.3 * (p * (p / before).log()).sum(1).mean()


def barlow_twins(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    x = torch.einsum("oc,bchw->bohw", given["expansion.0.weight"][:, :, 0, 0], a)
    x = normalised(given, "expansion.1", x).clamp_min(0).mean((2, 3))
    x = normalised(given, "projector.1", x @ given["projector.0.weight"].T).clamp_min(0)
    z = x @ given["projector.3.weight"].T
    first, second = z.chunk(2)
    size = z.shape[1]
    total = z.new_zeros(())
    for i in range(size):
        for j in range(size):
            u, v = first[:, i] - first[:, i].mean(), second[:, j] - second[:, j].mean()
            c = (u * v).mean() / ((u.square().mean() + 1e-5) * (v.square().mean() + 1e-5)).sqrt()
            total = total + ((1 - c) ** 2 if i == j else 5e-3 * c**2)
    return total / size


def info_pro(given: Given, a: Tensor, labels: Tensor, *, contrastive: bool = False) -> Tensor:
    places = torch.arange(8).double() * 5 / 7  # of 8 pixels among 6, corner on corner
    share = (1 - (places[:, None] - torch.arange(6)).abs()).clamp_min(0)
    large = torch.einsum("ip,jq,bcpq->bcij", share, share, a)
    hidden = F.conv2d(large, given["decoder.1.weight"], given["decoder.1.bias"], padding=1)
    hidden = normalised(given, "decoder.2", hidden).clamp_min(0)
    error = F.conv2d(hidden, given["decoder.4.weight"], given["decoder.4.bias"], padding=1) - given["network_input"]
    x = F.conv2d(a, given["head.0.weight"], stride=2, padding=1)
    x = normalised(given, "head.1", x).clamp_min(0).mean((2, 3))
    z = linear(given, "head.7", linear(given, "head.5", x).clamp_min(0))
    return 0.75 * error.square().mean() + 2 * (contrast(z, labels) if contrastive else cross_entropy(z, labels))


def contrast(z: Tensor, labels: Tensor) -> Tensor:
    """Khosla et al. (2020), equation 2, sample by sample."""
    z, losses = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        total = torch.stack([torch.exp(z[i] @ z[a] / 0.07) for a in others]).sum()
        partners = [p for p in others if labels[p] == labels[i]]
        losses.append(z.new_zeros(()))
        if partners:
            shares = [torch.log(torch.exp(z[i] @ z[p] / 0.07) / total) for p in partners]
            losses[-1] = -torch.stack(shares).mean()
    return torch.stack(losses).mean()


def distance_forward(given: Given, a: Tensor, labels: Tensor) -> Tensor:
    z = pooled(a)
    z = z / z.norm(dim=1, keepdim=True) * math.sqrt(16)
    losses = []
    for row, y in zip(z, labels, strict=True):
        near = [-(row - centre).square().sum() / 16 for centre in given["centres"]]
        excess = [torch.exp((near[c] - near[y] + 1) / 0.5) for c in range(3) if c != y]
        losses.append(torch.log(1 + torch.stack(excess).sum()))
    return torch.stack(losses).mean()


LAMBDAS = {"reconstruction": 1.0, "last_reconstruction": 0.25, "task": 2.0}  # the layer is the second of four

CASES: dict[str, tuple[Rule, Twin, int]] = {  # the rule, its twin, rows per sample
    "MonoForward": (MonoForward, mono_forward, 1),
    "PredictiveSimilarity": (PredictiveSimilarity, predictive_similarity, 1),
    "DGL": (DGL, dgl, 1),
    "AugLocal": (partial(AugLocal, most=2, least=2), aug_local, 1),
    "ForwardForward": (partial(ForwardForward, negatives=2), forward_forward, 4),
    "TaskAndConsistency": (TaskAndConsistency, task_and_consistency, 1),
    "BarlowTwins": (partial(BarlowTwins, width=5), barlow_twins, 2),
    "InfoPro": (partial(InfoPro, **LAMBDAS), info_pro, 1),
    "InfoProContrastive": (partial(InfoProContrastive, width=9, **LAMBDAS), partial(info_pro, contrastive=True), 1),
    "DistanceForward": (partial(DistanceForward, centres="trained", temperature=0.5), distance_forward, 1),
}


def make_layer(chosen: Rule, body: nn.Module) -> Layer:
    rule = chosen(LAYER).double()
    block = Block("conv", body).double()
    options = {"device": torch.device("cpu")}
    factory = optimizer_of(rule, partial(torch.optim.SGD, lr=RATE))
    if needs_pass(rule):
        return PassLayer(block, rule, LAYER, factory, sources=(), **options)
    return Layer(block, rule, LAYER, factory, **options)


def take_step(layer: Layer, x: Tensor, arrived: Given) -> None:
    if isinstance(layer, PassLayer):
        layer.begin(0, LABELS, arrived)
    layer.forward(x)
    layer.update(LABELS)


@pytest.mark.parametrize("name", CASES)
def test_first_steps(name: str) -> None:
    chosen, twin, rows = CASES[name]
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 4, 3)
    layer = make_layer(chosen, nn.Sequential(conv, nn.Tanh()))
    given = {n: p.detach().clone().requires_grad_() for n, p in layer.rule.named_parameters()}
    weight, bias = (p.detach().clone().requires_grad_() for p in conv.parameters())
    leaves = [*given.values(), weight, bias]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(rows * len(LABELS), 2, 8, 8, dtype=torch.float64, generator=generator)
        arrived = {
            "log_probabilities": torch.randn(7, 3, dtype=torch.float64, generator=generator).log_softmax(1),
            "network_input": torch.randn(7, 2, 8, 8, dtype=torch.float64, generator=generator),
        }
        take_step(layer, x, arrived)
        loss = twin({**given, **arrived}, torch.tanh(F.conv2d(x, weight, bias)), LABELS)
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            for leaf, grad in zip(leaves, grads, strict=True):
                leaf -= RATE * grad
        seen = float(layer.totals[0]) / len(LABELS)
        layer.totals.zero_()
        assert seen == pytest.approx(loss.item(), rel=1e-6)
    for n, value in layer.rule.named_parameters():
        torch.testing.assert_close(value.detach(), given[n].detach(), rtol=1e-6, atol=1e-12, msg=n)
    torch.testing.assert_close(conv.weight.detach(), weight.detach(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(conv.bias.detach(), bias.detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_soft_hebb_neuron_by_neuron(kind: str) -> None:
    torch.manual_seed(1)
    learner: nn.Module = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False) if kind == "conv" else nn.Linear(6, 4)
    layer = make_layer(partial(SoftHebb, temperature=0.7, rate=0.3), nn.Sequential(learner, nn.ReLU()))
    weight = learner.weight.detach().clone().flatten(1)  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        shape = (len(LABELS), 2, 8, 8) if kind == "conv" else (len(LABELS), 6)
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        take_step(layer, x, {})
        seen = list(x)
        if kind == "conv":
            wide = F.pad(x, (1, 1, 1, 1))
            seen = [
                wide[b, :, i : i + 3, j : j + 3].flatten() for b in range(7) for i in (0, 2, 4, 6) for j in (0, 2, 4, 6)
            ]
        delta = torch.zeros_like(weight)
        for one in seen:
            u = weight @ one
            y = torch.exp(u / 0.7) / torch.exp(u / 0.7).sum()
            for k in range(4):
                sign = 1 if u[k] == u.max() else -1
                delta[k] += sign * y[k] * (one - u[k] * weight[k])
        delta /= delta.abs().max()
        weight += 0.3 * (weight.norm(dim=1, keepdim=True) - 1).abs().sqrt() * delta
    torch.testing.assert_close(learner.weight.detach().flatten(1), weight, rtol=1e-6, atol=1e-12)  # type: ignore


def test_centres_follow_the_means_of_their_classes() -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(2, 4, 3)
    layer = make_layer(partial(DistanceForward, momentum=0.75, temperature=0.5), nn.Sequential(conv, nn.Tanh()))
    centres = layer.rule.centres.clone()
    weight, bias = (p.detach().clone().requires_grad_() for p in conv.parameters())
    labels = torch.tensor([0, 1, 0, 1, 0, 0, 1])  # none of the third class
    for _ in range(3):
        x = torch.randn(7, 2, 8, 8, dtype=torch.float64)
        layer.forward(x)
        layer.update(labels)
        a = torch.tanh(F.conv2d(x, weight, bias))
        loss = distance_forward({"centres": centres}, a, labels)
        for leaf, grad in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            leaf.data -= RATE * grad
        z = pooled(a.detach())
        z = z / z.norm(dim=1, keepdim=True) * 4
        for c in (0, 1):
            centres[c] = 0.75 * centres[c] + 0.25 * z[labels == c].mean(0)
    torch.testing.assert_close(layer.rule.centres, centres, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(conv.weight.detach(), weight.detach(), rtol=1e-6, atol=1e-12)


def test_the_first_layer_has_nothing_to_be_consistent_with() -> None:
    rule = TaskAndConsistency(replace(LAYER, index=0)).double()
    layer = PassLayer(
        Block("conv", nn.Sequential(nn.Conv2d(2, 4, 3))).double(),
        rule,
        LAYER,
        partial(torch.optim.SGD, lr=0.0),
        device=torch.device("cpu"),
        sources=(),
    )
    x = torch.randn(7, 2, 8, 8, dtype=torch.float64)
    take_step(layer, x, {})
    scores = pooled(layer.block(x)) @ rule.classifier.weight.T + rule.classifier.bias
    assert float(layer.totals[0]) / 7 == pytest.approx(float(cross_entropy(scores, LABELS)), rel=1e-9)


def test_a_contrast_without_partners_is_no_loss() -> None:
    from unlocked.rules.info_pro import supervised_contrast

    for count in (1, 3):
        z = torch.randn(count, 4, requires_grad=True)
        loss = supervised_contrast(z, torch.arange(count), 0.1)
        loss.backward()
        assert float(loss.detach()) == 0
        assert z.grad is not None
        assert torch.equal(z.grad, torch.zeros_like(z))


def test_every_rule_has_a_twin() -> None:
    from unlocked.rules import OTHER_RULES

    assert OTHER_RULES.keys() == CASES.keys() | {"DRTP", "SoftHebb"}  # theirs are tests of their own
    assert all(issubclass(rule, LocalRule) for rule in OTHER_RULES.values())  # type: ignore[arg-type]


def test_a_rule_of_level_two_fits_a_page() -> None:
    import unlocked.rules.soft_hebb as module

    assert module.__file__ is not None
    assert len(Path(module.__file__).read_text().splitlines()) <= 60
