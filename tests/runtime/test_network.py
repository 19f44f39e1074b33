"""From a user's model to layers: names, shapes, sizes of the local head, start values, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from unlocked.models import Block, initialise, small_conv
from unlocked.rules import LLS, CrossEntropy, LayerInfo, LLS_Random, LocalRule
from unlocked.runtime.costs import measure_costs
from unlocked.runtime.network import (
    Network,
    backpropagation_network,
    build_layer,
    build_network,
)
from unlocked.workers.layer import Layer

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.1)


def _small(seed: int = 0) -> Network:
    return build_network(small_conv(1, 10, 8), input_shape=(1, 8, 8), num_classes=10, seed=seed)


def _state(network: Network) -> list[Tensor]:
    return [value.clone() for block in network.blocks for value in block.state_dict().values()]


def test_shapes_are_followed_through() -> None:
    network = _small()
    assert network.names == ["conv1", "conv2", "conv3", "linear1", "output"]
    assert network.output_shapes == [(32, 4, 4), (64, 2, 2), (128, 2, 2), (512,), (10,)]
    assert [info.activation_shape for info in network.infos[:2]] == [(32, 8, 8), (64, 4, 4)]  # before the pool
    assert [info.num_latents for info in network.infos] == [512, 256, 512, 512, 10]
    assert [info.index for info in network.infos] == list(range(5))


def test_modules_of_ones_own_get_names_and_sizes() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU()),
        nn.Conv2d(6, 4, 8),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 12)),
        nn.Linear(12, 3),
    )
    network = build_network(model, input_shape=(2, 8, 8), num_classes=3, seed=0)
    assert network.names == ["sequential1", "conv2d2", "sequential3", "linear4"]
    assert [info.latent_size for info in network.infos[:3]] == [2, 1, 12]
    assert [block.is_output for block in network.blocks] == [False, False, False, True]
    assert all((info.hidden, info.reduced_rank) == (2048, 20) for info in network.infos)


def test_start_values_depend_on_seed_and_layer_alone() -> None:
    first, again, other = _small(), _small(), _small(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(_state(first), _state(again), strict=True))
    assert not torch.equal(
        first.blocks[0].state_dict()["body.conv.weight"], other.blocks[0].state_dict()["body.conv.weight"]
    )
    alone = small_conv(1, 10, 8)[3]
    initialise(alone, 0, 3)
    for name, value in alone.state_dict().items():
        assert torch.equal(first.blocks[3].state_dict()[name], value)


def test_weights_that_were_given_are_kept() -> None:
    model = [nn.Flatten(), nn.Linear(64, 12), nn.Linear(12, 10)]
    ours = small_conv(1, 10, 8)
    with torch.no_grad():
        ours[1].conv.weight[0, 0, 0, 0] += 1.0
    for blocks, kept in ((model, range(3)), (ours, [1])):
        before = copy.deepcopy([block.state_dict() for block in blocks])
        network = build_network(blocks, input_shape=(1, 8, 8), num_classes=10, seed=3)
        for index in kept:
            after = network.blocks[index].state_dict()
            for name, value in before[index].items():
                assert torch.equal(after[name if blocks is ours else f"body.{name}"], value)


def test_networks_of_ours_are_drawn_by_the_seed_until_someone_sets_their_weights() -> None:
    """A block that was loaded, trained or run in training mode is someone's; its neighbours are drawn still."""
    model, fresh = small_conv(1, 10, 8), _small(seed=3)
    with torch.no_grad():
        model[1].conv.weight[0, 0, 0, 0] += 1.0
    model[2](torch.ones(2, 64, 2, 2))  # moves BatchNorm's statistics
    network = build_network(model, input_shape=(1, 8, 8), num_classes=10, seed=3)
    equal = [
        all(torch.equal(a, b) for a, b in zip(x.state_dict().values(), y.state_dict().values(), strict=True))
        for x, y in zip(network.blocks, fresh.blocks, strict=True)
    ]
    assert equal == [True, False, False, True, True]


def test_networks_of_ours_neither_ask_nor_move_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = small_conv(1, 10, 8, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    torch.randn(3)
    second, network = small_conv(1, 10, 8, seed=4), _small(seed=4)
    for a, b, c in zip(first, second, network.blocks, strict=True):
        values = zip(a.state_dict().values(), b.state_dict().values(), c.state_dict().values(), strict=True)
        assert all(torch.equal(x, y) and torch.equal(y, z) for x, y, z in values)


def test_redrawing_is_by_seed_and_layer_whatever_there_was() -> None:
    def encoder() -> list[nn.Module]:
        head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return [nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True)), head]

    found = []
    for state in (0, 1):
        torch.manual_seed(state)
        network = build_network(encoder(), input_shape=(1, 8, 8), num_classes=10, seed=2, redraw=True)
        found.append(_state(network))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_following_the_shapes_leaves_statistics_and_modes_alone() -> None:
    network = _small()
    for block in network.blocks:
        assert block.training
        for name, value in block.named_buffers():
            assert float(value.double().sum()) == (len(value) if name.endswith("var") else 0), name


def test_backpropagation_has_one_layer_with_the_same_weights() -> None:
    local = _small()
    whole = backpropagation_network(local)
    assert whole.names == ["network"]
    assert (whole.input_shape, whole.output_shapes) == ((1, 8, 8), [(10,)])
    assert all(torch.equal(a, b) for a, b in zip(_state(whole), _state(local), strict=True))
    layer = build_layer(whole, 0, rule=[], optimizer=SGD, device=CPU, step=None)
    assert isinstance(layer.rule, CrossEntropy)
    assert len(layer.parameters) == sum(1 for block in local.blocks for _ in block.parameters())


def test_rules_by_layer() -> None:
    network = _small()
    rules = [LLS(temperature=t) for t in (0.1, 0.2, 0.3)] + [LLS_Random()]
    layers = [build_layer(network, i, rule=rules, optimizer=SGD, device=CPU, step=None) for i in range(5)]
    assert [getattr(layer.rule, "temperature", None) for layer in layers] == [0.1, 0.2, 0.3, 0.5, None]
    assert isinstance(layers[4].rule, CrossEntropy)
    with pytest.raises(ValueError, match="3 rules for 4 local layers; give one or one per layer"):
        build_layer(network, 0, rule=rules[:3], optimizer=SGD, device=CPU, step=None)


def test_measuring_changes_nothing() -> None:
    network = _small()
    before = _state(network)

    def make(index: int) -> Layer:
        return build_layer(network, index, rule=LLS(), optimizer=SGD, device=CPU, step=None)

    costs = measure_costs(make, network, batch_size=4, device=CPU, repeats=1)
    assert len(costs) == 5
    assert all(cost > 0 for cost in costs)
    assert all(torch.equal(a, b) for a, b in zip(_state(network), before, strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ([], "the model has no layers"),
        ([nn.Flatten(), nn.Linear(64, 7)], r"last layer linear2 gives \(7,\) per sample, but the data has 10 classes"),
        ([nn.Conv2d(1, 4, 3)], r"end the model in a layer with output \(10,\)"),
        ([nn.Conv2d(3, 4, 3)], r"the data gives \(1, 8, 8\) per sample, which layer conv2d1 can't take"),
        (
            [Block("a", nn.Flatten()), Block("b", nn.Linear(60, 10))],
            r"layer a gives \(64,\) per sample, which layer b can't take",
        ),
        (
            [Block("a", nn.Flatten()), Block("a", nn.Linear(64, 10))],
            r"names must differ from each other, got \['a', 'a'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(model: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(model, input_shape=(1, 8, 8), num_classes=10, seed=0)


@pytest.mark.parametrize(
    ("error", "words"), [(ValueError("no such row"), "no such row"), (SystemExit(3), r"it called sys\.exit\(3\)")]
)
def test_a_rule_that_fails_where_costs_are_measured_names_its_layer(error: BaseException, words: str) -> None:
    class Failing(LocalRule):
        def __init__(self, layer: LayerInfo) -> None:
            super().__init__()

        def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
            raise error

    network = _small()
    rules = [LLS(), LLS(), Failing, LLS()]

    def make(index: int) -> Layer:
        return build_layer(network, index, rule=rules, optimizer=SGD, device=CPU, step=None)

    with pytest.raises(RuntimeError, match=f"layer conv3 failed while its cost was measured: {words}"):
        measure_costs(make, network, batch_size=4, device=CPU, repeats=1)
