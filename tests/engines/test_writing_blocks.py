"""Blocks that write into their inputs get copies: the same bits on every engine, and others read what they would."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from writing_blocks import CASES, WIDTH, Own, RuleOfInput, train

from unlocked.kernels.dispatch import get_backend
from unlocked.models import Block
from unlocked.models.overwriting import Writes, find_writes
from unlocked.rules import LLS, LocalRule, Rule
from unlocked.runtime import Streams
from unlocked.runtime.network import backpropagation_network, build_layer, build_network
from unlocked.workers.fused import fused_step
from unlocked.workers.layer import Layer
from unlocked.workers.pass_layer import PassLayer

CPU = torch.device("cpu")
IMAGE = (WIDTH, 6, 6)


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_every_engine_and_after_a_resume(name: str, tmp_path: Path) -> None:
    _, whole = train(name, "sequential", snapshot_dir=tmp_path, snapshot_every=4)
    for stages in (2, 3):
        _, other = train(name, Streams(stages=stages))
        assert other.weights_sha256 == whole.weights_sha256
        assert other.epochs[-1].eval_loss == whole.epochs[-1].eval_loss
    _, resumed = train(name, Streams(stages=2), resume=sorted(tmp_path.iterdir())[0])
    assert resumed.weights_sha256 == whole.weights_sha256


class Scoring(LocalRule):
    """Has scores, so that evaluation takes body and tail apart."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(activations), labels)

    def scores(self, activations: Tensor) -> Tensor:
        return activations.flatten(2).mean(2)[:, :4]


class WritesOut(nn.Module):
    """Writes by an argument of a function, which torch.fx follows without a sign of it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, 1.0, out=x)


def _beginning(*begin: nn.Module) -> nn.Module:
    return nn.Sequential(*begin, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))


BODIES: Mapping[str, Callable[[], nn.Module]] = {
    "in place": lambda: _beginning(nn.LeakyReLU(0.3, inplace=True)),
    "out of torch's table": lambda: _beginning(nn.Hardswish(inplace=True)),
    "an argument out": lambda: _beginning(WritesOut()),
    "a forward of one's own": Own,
}


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("rule", [LLS(), Scoring, RuleOfInput], ids=["LLS", "scoring", "passes"])
@pytest.mark.parametrize("body", BODIES)
def test_a_layers_input_stays_as_it_is(body: str, rule: Rule, kernels: str) -> None:
    layer = _layer(BODIES[body](), rule, kernels)
    x = torch.randn(8, *IMAGE).contiguous(memory_format=torch.channels_last)
    before, labels = x.clone(), torch.arange(8) % 4
    if isinstance(layer, PassLayer):
        layer.begin(0, labels, {})
    layer.forward(x)
    if isinstance(layer, PassLayer):
        assert torch.equal(layer.step.current().input, before)  # type: ignore[attr-defined]
    layer.update(labels)
    layer.infer(x, "statistics")
    layer.evaluate(x)
    layer.infer(x, "evaluate")
    assert torch.equal(x, before)


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@pytest.mark.parametrize("rule", [LLS(), Scoring, RuleOfInput], ids=["LLS", "scoring", "passes"])
def test_a_rule_sees_what_the_body_made_whatever_its_tail_does(rule: Rule, kernels: str) -> None:
    """By a tail that computes the same elsewhere."""
    bodies = []
    for in_place in (True, False):
        torch.manual_seed(0)
        layer = _layer(_beginning(nn.Tanh()), rule, kernels, nn.Hardtanh(0.2, 0.5, inplace=in_place))
        torch.manual_seed(1)
        x, labels = torch.randn(8, *IMAGE), torch.arange(8) % 4
        if isinstance(layer, PassLayer):
            layer.begin(0, labels, {})
        output = layer.forward(x)
        layer.update(labels)
        scores = layer.evaluate(x)[1]
        bodies.append([output, *([] if scores is None else [scores]), *layer.block.state_dict().values()])
    assert all(map(torch.equal, *bodies))


def _layer(body: nn.Module, rule: Rule, kernels: str, tail: nn.Module | None = None) -> Layer:
    network = build_network(
        [Block("first", body, tail), nn.Sequential(nn.Flatten(), nn.Linear(216, 4))],
        input_shape=IMAGE,
        num_classes=4,
        seed=0,
    )
    step = fused_step(get_backend("cpp", CPU)) if kernels == "cpp" else None
    return build_layer(network, 0, rule=rule, optimizer=torch.optim.SGD, device=CPU, step=step)


class OnlyInTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.training else x * 2


class OnlyWithoutGradients(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_grad_enabled() else x.mul_(2)


class PastAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.data.numpy()[...] = 3.0
        return x * 2


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("made-up input does not suit it")


class Named(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        return x * scale.add_(1) * mask


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (nn.ReLU(inplace=True), Writes(input=True)),
        (nn.Sequential(nn.Identity(), nn.Flatten(), nn.SiLU(inplace=True)), Writes(input=True)),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), Writes()),
        (nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(3, 3)), Writes()),
        (nn.Sequential(nn.RReLU(inplace=True), nn.Linear(3, 3)), Writes(input=True)),
        (OnlyInTraining(), Writes(input=True)),
        (OnlyWithoutGradients(), Writes(input=True)),
        (PastAutograd(), Writes(input=True)),
        (Failing(), Writes(True, frozenset({"mask", "scale"}), True)),
        (Named(), Writes(beside=frozenset({"scale"}))),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_a_block_writes_into_is_found(body: nn.Module, expected: Writes) -> None:
    block = Block("layer", body).train()
    names = ("mask", "scale") if isinstance(body, Named | Failing) else ()
    states = torch.get_rng_state(), {name: value.clone() for name, value in block.state_dict().items()}
    found = find_writes(block, lambda: torch.randn(2, 3), {name: torch.ones(2, 3) for name in names})
    assert found == expected
    assert block.training
    assert all(torch.equal(value, states[1][name]) for name, value in block.state_dict().items())


def test_a_whole_network_writes_into_its_input_where_a_part_does() -> None:
    blocks = [nn.Identity(), nn.Sequential(nn.SiLU(inplace=True), nn.Flatten(), nn.Linear(216, 4))]
    network = build_network(blocks, input_shape=IMAGE, num_classes=4, seed=0)
    whole = build_layer(backpropagation_network(network), 0, rule=[], optimizer=torch.optim.SGD, device=CPU, step=None)
    x = torch.randn(2, *IMAGE)
    before = x.clone()
    whole.infer(x, "evaluate")
    assert torch.equal(x, before)
