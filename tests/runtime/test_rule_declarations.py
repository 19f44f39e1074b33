"""What a rule declares wrongly, or does that it may not, is said before the first step, with its name and the fix."""

from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.rules import DGL, BarlowTwins, Carried, Draw, LayerPass, LocalRule, Views
from unlocked.runtime import Trainer
from unlocked.runtime.network import build_network
from unlocked.runtime.rule_trial import check_rules


class Base(LocalRule):
    """A rule of level 3 with which nothing is wrong."""

    receives: Any = ("first",)
    carries: Any = MappingProxyType({"first": Carried((2,))})

    def carry(self, layer_pass: LayerPass) -> Any:
        return {"first": layer_pass.activations[:, :2]}

    def step(self, layer_pass: LayerPass) -> Any:
        return layer_pass.activations.square().mean()


class Twice(Views):
    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        return torch.cat([samples, samples + draw(1)])


class OneRow(Twice):
    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        return samples


class OtherType(Twice):
    def make_evaluation(self, samples: Tensor, num_classes: int) -> Tensor:
        return samples.double()


def only_mean(self: Any, layer_pass: LayerPass) -> Tensor:
    return layer_pass.activations.detach().mean()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"carries": ["first"]}, "has carries = ..first..; it is a dict"),
    ({"carries": {"first": (2,)}}, "carries 'first' as .2,.; write Carried"),
    ({"carries": {"first": Carried((0,))}}, "with positive sizes"),
    ({"carries": {"first": Carried((2,), "float")}}, "whose dtype is none of torch's"),  # type: ignore[arg-type]
    ({"carry": LocalRule.carry}, "has no method carry"),
    ({"carry": lambda self, p: {"first": p.activations}}, r"carry\(\) gives torch.float32 \[3, 4\] .* \[rows, 2\]"),
    ({"receives": "first"}, "it is a tuple of names"),
    ({"receives": (1,)}, "all of them are names"),
    ({"receives": ("second",)}, "layer two receives second, which no layer before it carries"),
    ({"step": lambda self, p: p.carried["second"].mean()}, "no tensor 'second' arrived"),
    ({"step": lambda self, p: p.next_layer.mean()}, "'LayerPass' object has no attribute 'next_layer'"),
    ({"step": lambda self, p: None}, r"step\(\) gives NoneType; it is the mean loss"),
    ({"step": only_mean}, "changes nothing in a step"),
    ({"views": 2}, "has views = 2; it is an object of a subclass of Views"),
    ({"views": Views(2)}, "Views, which has no method make"),
    ({"views": Twice(2, probe=1)}, "the output layer shall see number 1; there are 2 in training and 1 in evaluation"),
    ({"views": OneRow(2)}, r"make\(\) gives torch.float32 \[2, 6\] of 2 samples; 2 rows each are .* \[4, 6\]"),
    ({"views": OtherType(2)}, r"make_evaluation\(\) gives torch.float64 \[2, 6\]"),
    ({"read_out": float("nan"), "scores": lambda self, a: a[:, :3]}, "has read_out = nan; it is the finite weight"),
    ({"read_out": 1.0}, "has read_out 1.0, but no scores"),
    ({"optimizer": "Adam"}, "has optimizer = 'Adam'; it is \"layer\", None"),
]


def network() -> Any:
    torch.manual_seed(0)
    blocks = nn.Sequential()
    for name, sizes in (("one", (6, 4)), ("two", (4, 4)), ("last", (4, 3))):
        blocks.add_module(name, nn.Linear(*sizes))
    return blocks


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_declaration_is_named(changes: dict[str, Any], message: str) -> None:
    built = build_network(network(), input_shape=(6,), num_classes=3, seed=0)
    check_rules(built, Base)
    kind = type("Wrong", (Base,), changes)
    with pytest.raises(ValueError, match=rf"the rule Wrong .*{message}"):
        check_rules(built, partial(kind))


def test_two_views_are_not_made_of_tokens() -> None:
    built = build_network(network(), input_shape=(6,), num_classes=3, seed=0)
    with pytest.raises(ValueError, match=r"BarlowTwins makes 2 views .* shape \(6,\) and type torch.int64 don't give"):
        check_rules(built, BarlowTwins, sample=torch.zeros(6, dtype=torch.int64))


def test_a_rules_own_normalisation_needs_more_than_a_row() -> None:
    """The last micro-batch of an epoch would be a single sample, which fails in the middle of a run."""
    data = torch.utils.data.TensorDataset(torch.randn(9, 6), torch.arange(9) % 3)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = Trainer(network(), rule=DGL, optimizer=partial(torch.optim.SGD, lr=0.1), engine="sequential")
    with pytest.raises(ValueError, match=r"layer one normalises .*its rule's network.2 = BatchNorm1d.*one of 1"):
        trainer.fit(loader, epochs=1)
    Trainer(network(), rule=DGL, optimizer=partial(torch.optim.SGD, lr=0.1), engine="sequential").fit(
        torch.utils.data.DataLoader(data, batch_size=3), epochs=1
    )
