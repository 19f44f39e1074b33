"""A layer that draws: keyed by layer, micro-batch and use; and who becomes one."""

from functools import partial

import torch
from torch import Tensor, nn

from unlocked.models import small_conv
from unlocked.rules import LLS, LocalRule
from unlocked.rules.base import LayerInfo
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.runtime.rule_trial import check_rules
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.layer import Layer

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.0)
X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class NoisyRule(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.head = nn.Linear(layer.num_latents, layer.num_classes)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        noise = getattr(torch, "randn" + "_like")(activations)  # named by nothing: the rule's trial sees it
        return nn.functional.cross_entropy(self.head(activations + noise), labels)


class NoisySGD(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def _network(noisy: bool = True) -> Network:
    torch.manual_seed(0)
    model = [nn.Sequential(nn.Linear(6, 6), Noise() if noisy else nn.Tanh()), nn.Sequential(nn.Tanh()), nn.Linear(6, 3)]
    return build_network(model, input_shape=(6,), num_classes=3, seed=1)


def _layer(network: Network, index: int, rule: object = LLS(), optimizer: object = SGD) -> Layer:
    return build_layer(network, index, rule=rule, optimizer=optimizer, device=CPU, step=None)  # type: ignore[arg-type]


def _noise(layer: Layer) -> Tensor:
    return (layer.forward(X) - layer.block.body[0](X)).detach()  # type: ignore[index]


def test_only_what_draws_becomes_a_drawing_layer() -> None:
    """A layer that draws nothing is a plain one, to which nothing is added."""
    network = _network()
    assert [type(_layer(network, i)) for i in range(3)] == [DrawingLayer, Layer, Layer]
    assert [type(_layer(network, i, optimizer=NoisySGD)) for i in (1, 2)] == [DrawingLayer] * 2
    assert [type(_layer(_network(False), i)) for i in range(3)] == [Layer] * 3
    ours = build_network(small_conv(1, 10, 8, dropout=0.5), input_shape=(1, 8, 8), num_classes=10, seed=0)
    assert [type(_layer(ours, i)) for i in range(5)] == [Layer] * 5
    assert type(_layer(backpropagation_network(network), 0, [])) is DrawingLayer
    assert type(_layer(backpropagation_network(_network(False)), 0, [])) is Layer


def test_a_rule_that_draws_makes_its_layer_one_and_starts_by_key() -> None:
    found = []
    for state in (1, 2):
        network = check_rules(_network(False), NoisyRule)
        torch.manual_seed(state)
        layer = _layer(network, 0, NoisyRule)
        assert type(layer) is DrawingLayer
        assert type(_layer(network, 2, NoisyRule)) is Layer  # the output layer has no rule
        layer.forward(X)
        layer.update(LABELS)
        found.append([layer.totals[0], *layer.rule.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_micro_batch_has_draws_of_its_own_that_come_again_with_the_clock() -> None:
    network = _network()
    layer, again = _layer(network, 0), _layer(network, 0)
    noises = []
    for _ in range(3):
        noises.append(_noise(layer))
        layer.update(LABELS)
    assert not any(torch.equal(a, b) for i, a in enumerate(noises) for b in noises[:i])
    torch.manual_seed(7)
    torch.rand(3)
    again.set_clock(torch.tensor(1))
    assert torch.equal(_noise(again), noises[1])
    state = layer.state_dict()
    assert int(state["clock"]) == 3
    again.load_state_dict(state)
    assert torch.equal(_noise(again), _noise(layer))


def test_training_statistics_and_evaluation_draw_by_other_keys() -> None:
    layer = _layer(_network(), 0)
    values = [layer.forward(X), layer.infer(X, "statistics"), layer.infer(X, "evaluate")]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    assert torch.equal(layer.infer(X, "evaluate"), values[2])
    layer.forward(X)
    layer.update(LABELS)
    assert torch.equal(layer.infer(X, "evaluate"), values[2])
    assert not torch.equal(layer.infer(X, "statistics"), values[1])


def test_no_graph_is_captured_of_a_layer_that_the_host_seeds() -> None:
    assert not _layer(_network(), 0).is_capturable
