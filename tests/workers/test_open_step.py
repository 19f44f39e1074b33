"""Blocks in closed form under a rule that autograd follows: against autograd of both, in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from graph_blocks import CASES, Probe, assert_close_to_float64, made_layer, step_of
from torch import Tensor, nn

from unlocked.kernels import cpp, reference
from unlocked.models import Block
from unlocked.rules import LLS, LayerInfo, LocalRule, Tokens
from unlocked.runtime import Trainer
from unlocked.workers.layer import AutogradStep
from unlocked.workers.open_step import OpenStep

NAMES = [name for name, (make, _, _) in CASES.items() if not make().is_output]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_autograd_s_under_a_rule_without_a_closed_form(name: str) -> None:
    make, x, _ = CASES[name]
    tested = assert_close_to_float64(make, x, cpp, rule=Probe, kind=OpenStep)
    assert tested.step.body.rows[-1][1] == ("activations",)


@pytest.mark.parametrize("name", ["residual", "encoder"])
def test_a_wrong_gradient_at_the_activations_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, _ = CASES[name]
    original = OpenStep.descend

    def wrong(self: OpenStep, loss: Tensor) -> None:
        assert self._seen is not None
        self._seen.register_hook(lambda grad: 1.02 * grad)
        original(self, loss)

    monkeypatch.setattr(OpenStep, "descend", wrong)
    with pytest.raises(AssertionError):
        assert_close_to_float64(make, x, cpp, limit=1e-2, rule=Probe, kind=OpenStep)


def test_nothing_of_a_micro_batch_outlives_its_update() -> None:
    make, x, _ = CASES["residual"]
    layer = made_layer(make(), x, cpp, rule=Probe)
    step_of(layer, x)
    holders = [layer.step, layer.step.body.end, *(call.operation for call in layer.step.body.calls)]
    held = [
        (type(one).__name__, name)
        for one in holders
        for name, value in vars(one).items()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() >= len(x) * 8
    ]
    assert held == []


class _Blind(LocalRule):
    """Its loss is that of its own number alone."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.number = nn.Parameter(torch.ones(()))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return self.number.square()


def test_a_rule_that_looks_at_nothing_leaves_the_block_as_it_is() -> None:
    make, x, _ = CASES["encoder"]
    layer = made_layer(make(), x, cpp, rule=_Blind)
    assert isinstance(layer.step, OpenStep)
    before = {name: value.clone() for name, value in layer.tensors()}
    step_of(layer, x)
    changed = [name for name, value in layer.tensors() if not torch.equal(value, before[name])]
    assert changed == ["layer.rule.number"]


class _Tied(LocalRule):
    """Reads with a weight that is the block's own."""

    weight: nn.Parameter

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(activations @ self.weight, labels)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_weight_that_rule_and_block_share_gets_both_gradients() -> None:
    def changed(backend: Any) -> Tensor:
        torch.manual_seed(0)
        linear = nn.Linear(12, 12, bias=False)

        def rule(info: LayerInfo) -> LocalRule:
            made = _Tied(info)
            made.weight = linear.weight
            return made

        layer = made_layer(Block("layer", nn.Sequential(linear, nn.Tanh()), latent_size=12), x, backend, rule=rule)
        before = linear.weight.detach().clone()
        assert isinstance(layer.step, OpenStep if backend else AutogradStep)
        step_of(layer, x)
        return linear.weight.detach() - before

    x = torch.randn(6, 12)
    torch.testing.assert_close(changed(cpp), changed(None), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [nn.Sequential(nn.Flatten(), nn.Identity()), nn.Sequential(nn.Flatten(), nn.Linear(12, 8).requires_grad_(False))],
)
def test_where_nothing_trains_the_step_is_autograd_s(body: nn.Module) -> None:
    layer = made_layer(Block("layer", body, latent_size=4), torch.randn(6, 12), reference, rule=Probe)
    assert type(layer.step) is AutogradStep
    assert layer.step.why == "nothing in it trains"


class _Viewing(LocalRule):
    """Takes the activations for as dense as autograd gives them."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.view(len(activations), -1).square().mean()


def test_rows_may_be_viewed() -> None:
    make, x, _ = CASES["conv1d"]
    assert_close_to_float64(make, x, cpp, rule=_Viewing, kind=OpenStep)


@pytest.mark.parametrize("width", [11, 16])
def test_nothing_may_stand_before_a_head_of_tokens(width: int) -> None:
    """What is left of such a block is empty, and no block as a whole."""

    def losses(kernels: str) -> list[float]:
        torch.manual_seed(0)
        first = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, width), nn.Tanh())
        blocks = [
            Block("first", first, layout="tokens"),
            Block("output", nn.Sequential(nn.Linear(width, 11)), is_output=True),
        ]
        optimizer = partial(torch.optim.Adam, lr=0.01)
        trainer = Trainer(blocks, rule=LLS(), optimizer=optimizer, kernels=kernels, task=Tokens(), progress=False)
        told = trainer.fit((ids, ids.roll(-1, 1)), epochs=1, batch_size=8).epochs[0]
        return [loss for _, loss in told.local_losses]

    ids = torch.randint(0, 11, (24, 8), generator=torch.Generator().manual_seed(0))
    assert losses("cpp") == pytest.approx(losses("torch"), rel=1e-5)
