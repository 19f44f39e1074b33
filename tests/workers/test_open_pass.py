"""Blocks in closed form under rules that take whole passes: whatever such a rule does with its activations' graph."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from graph_blocks import CASES, assert_close_to_float64, made_layer, step_of
from torch import Tensor, nn

from unlocked.kernels import cpp
from unlocked.models import Block
from unlocked.rules import LayerInfo, LayerPass, LocalRule
from unlocked.workers.pass_layer import OpenPassStep, PassStep

NAMES = [name for name, (make, _, _) in CASES.items() if not make().is_output]


class _Probe(LocalRule):
    """Level 2: a probe of the activations, and all weights are to be small."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.probe = nn.Linear(layer.num_features, layer.num_classes)

    def step(self, layer_pass: LayerPass) -> Tensor:
        decay = sum(p.square().sum() for p in layer_pass.block.parameters())
        return self.loss(layer_pass.activations, layer_pass.labels) + 1e-3 * decay

    def loss(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.probe(activations.flatten(1)), labels) + 0.1 * activations.square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_autograd_s_under_a_rule_of_whole_passes(name: str) -> None:
    make, x, _ = CASES[name]
    tested = assert_close_to_float64(make, x, cpp, rule=_Probe, kind=OpenPassStep)
    assert tested.step.body.rows[-1][1] == ("activations",)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_a_wrong_way_back_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, _ = CASES[name]
    original = OpenPassStep.spend

    def wrong(self: OpenPassStep, number: int, grad: Tensor) -> object:
        return original(self, number, 1.02 * grad)

    monkeypatch.setattr(OpenPassStep, "spend", wrong)
    with pytest.raises(AssertionError):
        assert_close_to_float64(make, x, cpp, limit=1e-2, rule=_Probe, kind=OpenPassStep)


class _InPlace(_Probe):
    """Writes into the activations before it differentiates."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        return self.loss(layer_pass.activations.mul_(2), layer_pass.labels)


class _Twice(_Probe):
    """Two ways back from the same activations."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        self.loss(layer_pass.activations, layer_pass.labels).backward(retain_graph=True)
        return layer_pass.activations.square().mean()


class _Steepness(_Probe):
    """How steep the loss is in the block's weights is to be small: a gradient of gradients."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        steep = torch.autograd.grad(loss, list(layer_pass.block.parameters()), create_graph=True)
        return loss + sum(one.square().sum() for one in steep)


class _Again(_Probe):
    """Compares with a second forward, of another input."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        other = layer_pass.forward(layer_pass.input.flip(0))
        return self.loss(layer_pass.activations, layer_pass.labels) + (layer_pass.activations - other).square().mean()


@pytest.mark.parametrize(
    ("rule", "name"),
    [(rule, name) for rule in (_Twice, _Steepness, _Again) for name in ("conv", "linear", "tanh")]
    + [(_InPlace, "conv")],  # autograd itself refuses it where an activation's gradient is made of its result
)
def test_rules_may_do_with_the_graph_what_autograd_allows(rule: type[_Probe], name: str) -> None:
    """Parameters, running statistics and their counts are those of autograd in float64."""
    bodies = {
        "conv": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 12), nn.BatchNorm1d(12), nn.ReLU()),
        "tanh": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh()),
    }

    def make() -> Block:
        torch.manual_seed(1)
        return Block("layer", bodies[name](), latent_size=4 if name == "linear" else 2)

    x = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert_close_to_float64(make, x, cpp, rule=rule, kind=OpenPassStep)


@pytest.mark.parametrize("rule", [_InPlace, _Twice, _Steepness])
def test_a_second_forward_draws_what_the_first_drew(rule: type[_Probe]) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 1))
    state = {name: value.clone() for name, value in body.state_dict().items()}
    x = torch.randn(10, 3, 6, 6)
    found = []
    for backend in (cpp, None):
        body.load_state_dict(state)
        layer = made_layer(Block("layer", body, latent_size=2), x, backend, rule=rule)
        assert isinstance(layer.step, OpenPassStep if backend else PassStep)
        for _ in range(3):
            step_of(layer, x)
        found.append({name: value.clone() for name, value in layer.tensors()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=2e-3, atol=2e-4, msg=name)


class _Careless(_Probe):
    """Writes into a weight between forward and the way back."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        with torch.no_grad():
            next(layer_pass.block.parameters()).mul_(0.9)
        return loss


def test_a_weight_changed_before_the_way_back_is_an_error_as_in_autograd() -> None:
    make, x, _ = CASES["residual"]
    layer = made_layer(make(), x, cpp, rule=_Careless)
    assert isinstance(layer.step, OpenPassStep)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step_of(layer, x)


class _Looking(_Probe):
    """Needs no graph."""

    needs_graph = False

    def step(self, layer_pass: LayerPass) -> Tensor:
        assert not layer_pass.activations.requires_grad
        return layer_pass.activations.square().mean()


def test_without_a_graph_the_block_is_run_as_it_is() -> None:
    make, x, _ = CASES["residual"]
    assert type(made_layer(make(), x, cpp, rule=_Looking).step) is PassStep


@pytest.mark.parametrize("rule", [_Probe, _Twice, _Steepness])
def test_nothing_of_a_micro_batch_outlives_its_update(rule: type[_Probe]) -> None:
    make, x, _ = CASES["residual"]
    layer = made_layer(make(), x, cpp, rule=rule)
    step_of(layer, x)
    holders = [layer, layer.step, layer.step.body.end, *(call.operation for call in layer.step.body.calls)]
    held = [
        (type(one).__name__, name)
        for one in holders
        for name, value in vars(one).items()
        if (isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() >= len(x) * 8)
        or isinstance(value, LayerPass)
    ]
    assert held == []


def test_activations_go_with_their_micro_batch_and_not_with_the_garbage() -> None:
    """A graph that holds its own result would be freed by the collector alone, some steps later."""
    make, x, _ = CASES["residual"]
    seen: list[weakref.ref[Tensor]] = []

    class Noting(_Probe):
        def step(self, layer_pass: LayerPass) -> Tensor:
            seen.append(weakref.ref(layer_pass.activations.grad_fn))
            return super().step(layer_pass)

    layer = made_layer(make(), x, cpp, rule=Noting)
    gc.disable()
    try:
        step_of(layer, x)
        assert seen[0]() is None
    finally:
        gc.enable()
