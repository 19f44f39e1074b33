"""Law 1 inside one process: wherever layers are placed, `streams` computes what `sequential` does."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_runs import figures, fit, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.rules import LLS, RULES, LayerInfo, LocalRule
from unlocked.runtime import Trainer
from unlocked.workers.errors import StageError


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("kernels", "stages"), [("torch", (2, 5)), ("auto", (3, 4, 5))])
def test_streams_equal_sequential_for_every_rule(rule: str, kernels: str, stages: tuple[int, ...]) -> None:
    """On the CPU, at 2 to 5 stages: evaluation, statistics, partial batches, dropout, augmentation, tick graphs."""
    built = RULES[rule](temperature=0.5)
    plan = {"batch_size": 8, "max_steps": 11}  # eight full micro-batches and one of 6 rows an epoch
    expected = fit(trainer(rule=built, kernels=kernels), **plan)
    for count in stages:
        one = trainer("streams", built, kernels=kernels, stages=count, queue_depth=2, graph_ticks=2)
        got = fit(one, **plan)
        assert len(got.stages) == count
        assert got.weights_sha256 == expected.weights_sha256
        assert figures(got) == figures(expected)


@settings(max_examples=8)
@given(stages=st.integers(1, 5), depth=st.integers(1, 8), batch=st.integers(2, 40), steps=st.integers(1, 9))
def test_placement_never_changes_a_result(stages: int, depth: int, batch: int, steps: int) -> None:
    plan = {"batch_size": batch, "max_steps": steps, "drop_last": 70 % batch == 1}  # one row has no statistics
    expected = fit(trainer(), **plan)
    got = fit(trainer("streams", stages=stages, queue_depth=depth), **plan)
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)
    assert got.steps == expected.steps


def test_kernels_agree_within_rounding() -> None:
    """The closed form in C++ against autograd, over an epoch of SGD."""
    options = {"optimizer": partial(torch.optim.SGD, lr=1e-2)}
    a, b = (fit(trainer(kernels=k, **options), max_steps=3, epochs=1) for k in ("torch", "auto"))
    for name, value in a.weights.items():
        torch.testing.assert_close(b.weights[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_backpropagation_takes_its_loss_from_the_head_kernel() -> None:
    """The closed form of the loss against autograd's, over an epoch of SGD: weights, losses and both counts."""
    options: dict[str, Any] = {"rule": "BP", "optimizer": partial(torch.optim.SGD, lr=1e-2)}
    plain, fused = (fit(trainer(**options, kernels=kernels), epochs=1) for kernels in ("torch", "auto"))
    for name, value in plain.weights.items():
        torch.testing.assert_close(fused.weights[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert fused.weights_sha256 != plain.weights_sha256
    a, b = plain.epochs[0], fused.epochs[0]
    assert (b.train_acc1, b.train_acc5) == (a.train_acc1, a.train_acc5)
    assert b.train_loss == pytest.approx(a.train_loss, rel=1e-5)


@pytest.mark.parametrize("rule", ["BP", "LLS"])
def test_compiling_keeps_the_numbers(rule: str) -> None:
    """By a backend that traces the modules and runs the traced operations as they are."""
    options: dict[str, Any] = {"rule": "BP" if rule == "BP" else LLS(), "kernels": "torch"}
    plain, traced = (fit(trainer(**options, compile=c), max_steps=3, epochs=1) for c in (False, "eager"))
    assert traced.weights_sha256 == plain.weights_sha256


def test_backpropagation_trains_end_to_end() -> None:
    result = fit(trainer(rule="BP"), epochs=8)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    with pytest.raises(ValueError, match="not local"):
        trainer("processes", "BP")


def test_a_non_finite_loss_names_layer_epoch_and_micro_batch() -> None:
    with pytest.raises(StageError, match=r"epoch 0, train micro-batch \d+\).*loss of layer \w+ is"):
        fit(trainer(optimizer=partial(torch.optim.SGD, lr=1e38)))


class Prototypes(LocalRule):
    """Distances to learnt class centres."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        distances = (activations.flatten(1)[:, None] - self.centres).square().mean(2)
        return F.cross_entropy(-distances, labels)


def test_a_rule_and_a_network_of_ones_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator)
    labels = x[:, :3].argmax(1)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1)),
        nn.Linear(32, 3),
    )
    results = [
        Trainer(
            copy.deepcopy(net), rule=[Prototypes, LLS()], optimizer=partial(torch.optim.Adam, lr=1e-2), engine=engine
        ).fit((x, labels), epochs=10, batch_size=32, eval_data=(x, labels))
        for engine in ("sequential", "streams")
    ]
    assert results[0].weights_sha256 == results[1].weights_sha256
    assert results[0].test_acc1 is not None
    assert results[0].test_acc1 > 90


def test_shapes_that_do_not_chain_name_both_layers() -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.Linear(32, 3))
    one = Trainer(net, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"layer linear1 gives \(64,\) per sample, which layer linear2 can't take"):
        one.fit((torch.randn(8, 20), torch.arange(8) % 3), epochs=1, batch_size=4)
