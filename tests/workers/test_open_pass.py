"""Blocks in closed form under rules that take whole passes: whatever such a rule does with its activations' graph."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_blocks import CASES, assert_close_to_float64, forward_of, made_layer, step_of
from torch import Tensor, nn

from unlocked.kernels import cpp
from unlocked.kernels.cpp import winograd
from unlocked.models import Block
from unlocked.rules import LayerInfo, LayerPass, LocalRule
from unlocked.workers.layer import Layer
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
        tail = nn.Dropout(0.0) if name == "linear" else nn.MaxPool2d(2)
        return Block("layer", bodies[name](), tail, latent_size=4 if name == "linear" else 2)

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
        layer = made_layer(Block("layer", body, nn.MaxPool2d(2), latent_size=2), x, backend, rule=rule)
        assert isinstance(layer.step, OpenPassStep if backend else PassStep)
        for _ in range(3):
            step_of(layer, x)
        found.append({name: value.clone() for name, value in layer.tensors()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=2e-3, atol=2e-4, msg=name)


class _Moving(_Probe):
    """Changes what no way back reads, and vectors, between forward and the way back."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        with torch.no_grad():
            for parameter in layer_pass.block.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.01)
        return loss


class _Freezing(_Probe):
    """Freezes a parameter in its second step, and all but one in its third."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        if layer_pass.step:
            for parameter in list(layer_pass.block.parameters())[: 1 if layer_pass.step == 1 else -1]:
                parameter.requires_grad_(False)
        return self.loss(layer_pass.activations, layer_pass.labels)


class _Batched(_Probe):
    """Several ways back at once."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        of_loss = torch.autograd.grad(
            *(loss, layer_pass.activations, torch.tensor([1.0, 2.0], dtype=loss.dtype)),
            is_grads_batched=True,
            retain_graph=True,
        )[0]
        weights = list(layer_pass.block.parameters())
        grads = torch.autograd.grad(layer_pass.activations, weights, of_loss, is_grads_batched=True)
        for parameter, grad in zip(weights, grads, strict=True):
            parameter.grad = grad.sum(0)
        return loss.detach()


@pytest.mark.parametrize("rule", [_Moving, _Freezing, _Batched])
def test_rules_may_change_parameters_and_ask_for_several_gradients(rule: type[_Probe]) -> None:
    """Three steps are those of autograd in float64, with statistics and their counts."""
    x = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for backend in (cpp, None):
        torch.manual_seed(1)
        norms = nn.BatchNorm2d(16), nn.BatchNorm2d(8)
        body = nn.Sequential(nn.Conv2d(3, 16, 3), norms[0], nn.ReLU(), nn.Conv2d(16, 8, 1), norms[1], nn.Tanh())
        layer = made_layer(Block("layer", body, latent_size=2), x, backend, rule=rule)
        if backend is None and rule is not _Moving:  # autograd refuses to have a norm's weight changed
            layer.block.double()
            layer.rule.double()
        for _ in range(3):
            if rule is _Moving and backend is None:
                _moved_by_hand(layer, x)
            else:
                step_of(layer, x.to(next(layer.block.parameters()).dtype))
        found.append({name: value.clone() for name, value in layer.tensors()})
    for name, value in found[0].items():
        torch.testing.assert_close(value.double(), found[1][name].double(), rtol=2e-3, atol=2e-4, msg=name)


def _moved_by_hand(layer: Layer, x: Tensor) -> None:
    """A step of `_Moving` whose way back comes first."""
    labels = torch.arange(len(x)) % 5
    forward_of(layer, x, labels)
    one = layer.step.current()
    layer.optimizer.zero_grad()
    layer.rule.loss(one.activations, labels).backward()
    with torch.no_grad():
        for parameter in layer.block.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.01)
    layer.optimizer.step()
    layer.advance(1)


class _Careless(_Probe):
    """Writes between forward and the way back into what that reads."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        with torch.no_grad():
            [p for p in layer_pass.block.parameters() if p.dim() > 1][-1].mul_(0.9)
        return loss


class _CarelessOfInput(_Probe):
    """Likewise, into the block's input."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = self.loss(layer_pass.activations, layer_pass.labels)
        layer_pass.input.mul_(0.9)
        return loss


@pytest.mark.parametrize("rule", [_Careless, _CarelessOfInput])
def test_what_the_way_back_reads_may_not_be_changed_before_it_as_in_autograd(rule: type[_Probe]) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.Tanh())
    x = torch.randn(10, 3, 6, 6)
    layer = made_layer(Block("layer", body, latent_size=2), x.clone(), cpp, rule=rule)
    assert isinstance(layer.step, OpenPassStep)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.* of the layer layer"):
        step_of(layer, x.clone())


class _Shared(nn.Module):
    """A linear map of the input whose weight comes again, in another call or as it is."""

    def __init__(self, *, called: bool) -> None:
        super().__init__()
        self.map, self.called = nn.Linear(12, 12), called

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.map(x))
        return self.map(y) if self.called else F.linear(y, self.map.weight)


@pytest.mark.parametrize("backend", [cpp, None])
@pytest.mark.parametrize("called", [True, False])
def test_a_weight_that_comes_twice_is_read_on_the_way_back(called: bool, backend: Any) -> None:
    """Of its first use alone, a map of the input, the gradient would be known without it."""
    x = torch.randn(10, 12)
    layer = made_layer(Block("layer", _Shared(called=called), latent_size=12), x, backend, rule=_Careless)
    assert isinstance(layer.step, OpenPassStep if backend else PassStep)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step_of(layer, x)


@pytest.mark.parametrize("backend", [cpp, None])
def test_activations_that_the_next_layer_reads_are_not_to_be_written_into(backend: Any) -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
    x = torch.randn(10, 3, 6, 6)
    with pytest.raises(ValueError, match=r"_InPlace writes into the activations, .* write into a copy"):
        step_of(made_layer(Block("layer", body, latent_size=2), x, backend, rule=_InPlace), x)


def test_gradients_are_made_although_the_caller_wants_none() -> None:
    make, x, _ = CASES["residual"]
    layer = made_layer(make(), x, cpp, rule=_Probe)
    before = [p.detach().clone() for p in layer.block.parameters()]
    with torch.no_grad():
        step_of(layer, x)
    assert not any(torch.equal(p, kept) for p, kept in zip(layer.block.parameters(), before, strict=True))


@pytest.mark.skipif(bool(winograd.unavailable("cpu")), reason=winograd.unavailable("cpu") or "-")
def test_a_whole_network_keeps_autograd() -> None:
    inner = Block("inner", nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), latent_size=2)
    x = torch.randn(10, 3, 6, 6)
    layer = made_layer(Block("layer", nn.Sequential(inner, nn.Tanh()), latent_size=2), x, winograd, rule=_Probe)
    assert type(layer.step) is PassStep


class _Looking(_Probe):
    """Needs no graph."""

    needs_graph = False

    def step(self, layer_pass: LayerPass) -> Tensor:
        assert not layer_pass.activations.requires_grad
        return layer_pass.activations.square().mean()


def test_without_a_graph_the_block_is_run_as_it_is() -> None:
    make, x, _ = CASES["residual"]
    assert type(made_layer(make(), x, cpp, rule=_Looking).step) is PassStep


class _Detached(_Probe):
    """Goes no way back."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        self.probe.weight.grad = torch.ones_like(self.probe.weight)
        return self.loss(layer_pass.activations, layer_pass.labels).detach()


class _Elsewhere(_Probe):
    """Learns from a second forward alone."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        return self.loss(layer_pass.forward(layer_pass.input), layer_pass.labels)


@pytest.mark.parametrize("rule", [_Probe, _Twice, _Steepness, _Detached, _Elsewhere, _Freezing, _InPlace])
@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_nothing_of_a_micro_batch_outlives_its_update(rule: type[_Probe], name: str) -> None:
    make, x, _ = CASES[name]
    block = make()
    block.tail = nn.Flatten() if rule is not _InPlace else nn.Softsign()
    layer = made_layer(block, x, cpp, rule=rule)
    step_of(layer, x)
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
