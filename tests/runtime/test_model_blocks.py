"""What a model does around its layers is refused, as the layers are called one by one; what hangs on a layer runs."""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import Block, split
from unlocked.rules import LLS
from unlocked.runtime import Trainer

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


def scaled(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] * 10,)


def nothing(*_: Any) -> None:
    return None


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 3))


def hooked(register: str, place: Callable[[nn.Sequential], nn.Module] = lambda model: model) -> nn.Sequential:
    model = plain()
    getattr(place(model), register)(scaled if register == "register_forward_pre_hook" else nothing)
    return model


class OwnForward(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 10)


class OwnList(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x * 10)
        return x


class OwnBlock(Block):
    def forward(self, x: Tensor, **beside: Tensor) -> Tensor:
        return super().forward(x * 10, **beside)


class Renamed(nn.Sequential):
    """A class of one's own that computes what an nn.Sequential does."""


def patched(model: Any) -> Any:
    model.forward = types.MethodType(lambda self, x: type(self).forward(self, x * 10), model)
    return model


def blocks(register: str) -> list[nn.Module]:
    first, last = plain()
    block = Block("first", first)
    getattr(block, register)(nothing)
    return [block, last]


REFUSED = {
    "forward pre-hook": (lambda: hooked("register_forward_pre_hook"), r"a forward pre-hook \(scaled\)"),
    "forward hook": (
        lambda: hooked("register_forward_hook"),
        r"^the model, a Sequential, has a forward hook \(nothing\)",
    ),
    "backward hook": (lambda: hooked("register_full_backward_hook"), "has a backward hook"),
    "backward pre-hook": (lambda: hooked("register_full_backward_pre_hook"), "has a backward pre-hook"),
    "forward of the object": (lambda: patched(plain()), r"has a forward\(\) of this one object.*hang it on a layer"),
    "forward of a Sequential": (
        lambda: OwnForward(*plain()),
        r"the model's class OwnForward is an nn.Sequential with a forward\(\) of its own.*split\(model, at=",
    ),
    "forward of a ModuleList": (lambda: OwnList(plain()), r"an nn.ModuleList with a forward\(\) of its own"),
    "hook on a block": (lambda: blocks("register_forward_hook"), "layer first is a block that has a forward hook"),
    "forward of a block": (
        lambda: [OwnBlock("first", plain()[0]), plain()[1]],
        r"layer first is a block that has a forward\(\) of its own",
    ),
}


@pytest.mark.parametrize("rule", [LLS(), "BP"], ids=["LLS", "BP"])
@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED)
def test_what_no_layer_would_run_is_refused(make: Callable[[], Any], told: str, rule: Any) -> None:
    trainer = Trainer(make(), rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1))
    for use in (lambda: trainer.fit((X, Y), epochs=1, batch_size=10), lambda: trainer.predict(X)):
        with pytest.raises(ValueError, match=told) as caught:
            use()
        assert "\n" not in str(caught.value)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = plain()
        self.other = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.stage(x))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (lambda whole: whole, r"the Whole has a forward pre-hook \(scaled\), but is cut into layers"),
        (lambda whole: whole.stage, r"stage, a Sequential, has a forward pre-hook \(scaled\), but is cut into layers"),
    ],
    ids=["root", "a module with a cut inside"],
)
def test_split_refuses_hooks_on_what_it_cuts(place: Callable[[Whole], nn.Module], told: str) -> None:
    whole = Whole()
    place(whole).register_forward_pre_hook(scaled)
    with pytest.raises(ValueError, match=told):
        split(whole, at=["stage.1", "other"])
    with pytest.raises(ValueError, match=r"the Whole has a forward\(\) of this one object"):
        split(patched(Whole()), at=["other"])


def reference(model: nn.Module) -> None:
    """Backpropagation by a plain loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("cut", [False, True])
def test_hooks_on_a_layer_run(cut: bool) -> None:
    def make() -> Whole:
        torch.manual_seed(0)
        whole = Whole()
        (whole.stage if cut else whole.stage[0]).register_forward_pre_hook(scaled)
        return whole

    whole, expected = make(), make()
    model: Any = split(whole, at=["other"]) if cut else Renamed(*whole.stage, whole.other)
    trainer = Trainer(model, rule="BP", optimizer=partial(torch.optim.SGD, lr=0.1), threads=1)
    trainer.fit((X, Y), epochs=1, batch_size=50)
    reference(expected)
    for found, one in zip(whole.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, one, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(trainer.predict(X), expected.eval()(X), atol=1e-5)


def test_a_forward_of_ones_own_is_cut_by_split() -> None:
    model, expected = OwnForward(*plain()), OwnForward(*plain())
    trainer = Trainer(split(model, at=["1"]), rule="BP", optimizer=partial(torch.optim.SGD, lr=0.1), threads=1)
    trainer.fit((X, Y), epochs=1, batch_size=50)
    reference(expected)
    for found, one in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, one, atol=1e-6)
    assert torch.allclose(trainer.predict(X), expected(X), atol=1e-5)
