"""What a layer draws from is found before training; what draws nothing is left alone."""

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from unlocked.models import Block, KeyedDropout, small_conv
from unlocked.models.chance import find_draws
from unlocked.models.generators import SOURCES, GlobalGenerators, mixed
from unlocked.models.named_draws import DRAWING_NAMES, named_draws

CPU = torch.device("cpu")
TORCH = frozenset({"torch"})


def _draws(module: nn.Module, shape: tuple[int, ...] = (2, 4)) -> frozenset[str]:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return find_draws(Block("layer", module), lambda: x)


def _rarely(x: Tensor) -> Tensor:
    return x + torch.randn_like(x) if x.sum() > 1e9 else x


class Calls(nn.Module):
    """Whatever `function` makes of the input."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x)
        return y


class Rarely(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.helper(x)

    def helper(self, x: Tensor) -> Tensor:
        return _rarely(x)


class Silent(nn.Module):
    """Has names that sound like draws, of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.normal = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rand(self.dropout(x)) + self.normal

    def rand(self, x: Tensor) -> Tensor:
        return 2 * x


def test_every_random_operation_of_torchs_that_has_a_name_in_python_is_known() -> None:
    """By the tag that torch gives them; left out are those that draw only if told to, which the trial sees."""
    tagged = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == "aten" and not name.startswith("_"):
            packet = getattr(torch.ops.aten, name)
            overload = getattr(packet, schema.overload_name or "default", None)
            if overload is not None and torch.Tag.nondeterministic_seeded in overload.tags:
                tagged.add(name)
    spelt = {n for n in tagged if any(callable(getattr(place, n, None)) for place in (torch, F, Tensor))}
    only_if_told = {"lstm", "gru", "rnn_relu", "rnn_tanh", "scaled_dot_product_attention", "miopen_rnn"}
    assert {"bernoulli", "randn_like", "rrelu"} <= spelt
    assert spelt - only_if_told <= DRAWING_NAMES


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Rarely(), TORCH),
        (nn.Sequential(nn.Linear(4, 4), Rarely()), TORCH),
        (Calls(_rarely), TORCH),
        (Calls(functools.partial(F.rrelu, training=True)), TORCH),
        (Calls(lambda x: x * random.random() if x.sum() > 1e9 else x), frozenset({"random"})),
        (Calls(lambda x: x * np.random.beta(1, 1) if x.sum() > 1e9 else x), frozenset({"numpy"})),
        (Calls(lambda x: getattr(torch, "randn" + "_like")(x) + x), TORCH),  # no name tells, the trial does
        (Calls(lambda x: x.missing()), TORCH),  # can't be tried
    ],
    ids=["method", "child", "attribute", "partial", "random", "numpy", "trial", "failing"],
)
def test_a_draw_is_found_though_made_up_data_does_not_make_it(module: nn.Module, expected: frozenset[str]) -> None:
    assert _draws(module) == expected


def test_a_hook_that_draws_is_found() -> None:
    module = nn.Linear(4, 4)
    module.register_forward_hook(lambda m, inputs, output: _rarely(output))
    assert _draws(module) == TORCH


def test_a_draw_in_the_backward_is_found() -> None:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return getattr(torch, "rand" + "_like")(grads[0])  # named by nothing

    assert _draws(nn.Sequential(nn.Linear(4, 4), Calls(lambda x: Rounded.apply(x)))) == TORCH


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5)),
        Silent(),
        nn.LSTM(4, 4),
        nn.MultiheadAttention(4, 2),
        fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    ],
    ids=["plain", "own", "lstm", "attention", "traced"],
)
def test_nothing_is_found_where_nothing_is_drawn(module: nn.Module) -> None:
    block = Block("layer", module)
    assert not any(named_draws(m) for m in block.modules())
    if not isinstance(module, nn.LSTM | nn.MultiheadAttention):
        assert not _draws(module)


def test_nothing_is_found_in_networks_of_ours() -> None:
    def never() -> Tensor:
        raise AssertionError("known by their classes, so they are not tried")

    for block in small_conv(1, 10, 8, dropout=0.5):
        assert find_draws(block, never) == frozenset()


def test_a_trial_leaves_the_layer_and_the_generators_alone() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(x) * random.random() * float(np.random.rand()) + torch.rand(4)

    module = Counts()
    states = GlobalGenerators(SOURCES, CPU)
    before, statistics = states.states(), module.norm.running_mean.clone()
    assert _draws(module) == frozenset(SOURCES)
    assert not states.moved(before)
    assert module.calls == 0
    assert module.training
    assert torch.equal(module.norm.running_mean, statistics)
    assert not module._forward_hooks


def test_keyed_draws_follow_from_the_key_and_put_everything_back() -> None:
    generators = GlobalGenerators(SOURCES, CPU)

    def draw(key: int) -> tuple[float, float, float]:
        with generators.keyed(key):
            return torch.rand(()).item(), random.random(), float(np.random.rand())

    before = generators.states()
    keys = [mixed(base, step) for base in (0, 1, 2**63 - 1) for step in range(50)]
    found = [draw(key) for key in keys]
    assert found == [draw(key) for key in keys]
    assert len(set(found)) == len(keys)
    assert not generators.moved(before)

    def fail() -> None:
        with generators.keyed(1):
            torch.rand(1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not generators.moved(before)
    torch.rand(1)
    assert generators.moved(before) == TORCH


def test_mixed_is_splitmix64() -> None:
    """The generator's first outputs from state 0, as published with its reference implementation."""
    assert [mixed(0, step) for step in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_dropout_by_key_needs_no_seeding() -> None:
    assert _draws(nn.Sequential(nn.Dropout(0.5), KeyedDropout(0.3))) == frozenset()
    assert _draws(nn.Sequential(nn.AlphaDropout(0.5))) == TORCH
    assert _draws(nn.Sequential(nn.AlphaDropout(0.0))) == frozenset()


def test_a_change_in_place_after_an_inner_module_is_seen() -> None:
    """Its output is the inner one's very tensor, of which a copy is kept already."""
    runs = itertools.count()

    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Calls(torch.sin)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x)
            return y.add_(next(runs))

    with pytest.raises(ValueError, match=r"module body \(Shifts\): gives other values"):
        _draws(Shifts())


class Centres(nn.Module):
    """Writes into its input, and into the mask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x -= x.mean(1, keepdim=True) + 1
        if mask is not None:
            x *= mask.add_(1)
        y: Tensor = self.a(x)
        return y


class Activates(Centres):
    """Begins with an activation that takes its input's place, inside a module that no table knows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(F.silu(x, inplace=True) if mask is None else F.silu(x, inplace=True) * mask.neg_())
        return y


@pytest.mark.parametrize("kind", [Centres, Activates])
def test_what_writes_into_its_input_draws_nothing(kind: type[Centres]) -> None:
    assert _draws(kind()) == frozenset()
    x, mask = torch.randn(2, 4), torch.ones(2, 1)
    kept, names = x.clone(), {"mask": mask}
    assert find_draws(Block("layer", kind()), lambda: x, names) == frozenset()
    assert torch.equal(x, kept)
    assert torch.equal(mask, torch.ones(2, 1))


def test_one_output_is_copied_once_however_many_modules_hand_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Size] = []
    clone = Tensor.clone

    def counted(self: Tensor) -> Tensor:
        copies.append(self.shape)
        return clone(self)

    monkeypatch.setattr(Tensor, "clone", counted)
    module: nn.Module = Calls(lambda x: x[:, :3])  # its input is copied as well
    for _ in range(5):
        module = nn.Sequential(module)
    _draws(module)
    assert copies.count(torch.Size([2, 3])) == 4  # two runs, each in training and in eval mode
