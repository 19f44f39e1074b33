"""The closed form of every kind of block, at sizes of all kinds, against autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graph_blocks import CASES, Probe, made_layer, step_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unlocked.kernels import reference
from unlocked.kernels.dispatch import get_backend
from unlocked.models import Block, ConvBlock, DepthwiseBlock, LinearBlock, initialise
from unlocked.rules import LLS, LayerInfo, LLS_MxM, LocalLosses
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.layer import Layer, OptimizerFactory
from unlocked.workers.open_step import OpenStep

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.5)
RULES = {"LLS": LLS(), "LLS_MxM": LLS_MxM(label_smoothing=0.1), "LocalLosses": LocalLosses(temperature=2.0)}


def _layer(
    block: Block,
    rule: str,
    shape: tuple[int, ...],
    latent_size: int,
    backend: object,
    optimizer: OptimizerFactory = SGD,
) -> Layer:
    initialise(block, seed=0, layer=0)
    info = LayerInfo(
        name="layer",
        index=0,
        activation_shape=shape,
        num_classes=5,
        latent_size=latent_size,
        hidden=30,
        reduced_rank=4,
        seed=0,
    )
    step = None if backend is None else fused_step(backend)  # type: ignore[arg-type]
    return Layer(block, RULES[rule](info), info, optimizer, device=CPU, step=step)


def _compare(make: object, rule: str, x: torch.Tensor, latent_size: int, backend: object) -> None:
    """One step of each: outputs, losses, and everything that is trained or counted."""
    labels = torch.arange(len(x)) % 5
    block = make()  # type: ignore[operator]
    with torch.no_grad():
        shape = tuple(block.eval().body(x).shape[1:])
    block.train()
    truth, fused = _layer(block, rule, shape, latent_size, None), _layer(make(), rule, shape, latent_size, backend)  # type: ignore[operator]
    assert isinstance(fused.step, FusedStep)
    expected, found = truth.forward(x), fused.forward(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    truth.update(labels)
    fused.update(labels)
    torch.testing.assert_close(fused.totals[0], truth.totals[0], rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(fused.tensors(), truth.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


@given(
    height=st.integers(3, 11),
    width=st.integers(3, 11),
    latent_size=st.integers(1, 6),
    pool=st.sampled_from([*((kind, None) for kind in ("none", "max", "mean")), *(("average", n) for n in (1, 2, 4))]),
    rule=st.sampled_from(list(RULES)),
    depthwise=st.booleans(),
)
@settings(max_examples=60)
def test_planes_of_any_size(
    height: int, width: int, latent_size: int, pool: tuple[str, int | None], rule: str, depthwise: bool
) -> None:
    """Windows that tile the plane, that overlap, and that are more than there are pixels."""
    kind = DepthwiseBlock if depthwise else ConvBlock
    x = torch.randn(4, 3, height, width).contiguous(memory_format=torch.channels_last)
    make = partial(kind, 3, 6, pool=pool[0], pool_size=pool[1], latent_size=latent_size)  # type: ignore[arg-type]
    _compare(make, rule, x, latent_size, reference)


@pytest.mark.parametrize("latent_size", [1, 7, 12, 24, 31])
@pytest.mark.parametrize("rule", list(RULES))
def test_flat_activations_with_any_number_of_latents(rule: str, latent_size: int) -> None:
    make = partial(LinearBlock, 10, 12, latent_size=latent_size)
    _compare(make, rule, torch.randn(6, 10), latent_size, reference)


SIZES = [(8, 2, "max"), (9, 4, "max"), (7, 2, "average"), (2, 4, "none")]


@pytest.mark.parametrize(("size", "latent_size", "pool"), SIZES)
def test_this_machines_kernels_too(size: int, latent_size: int, pool: str) -> None:
    x = torch.randn(4, 16, size, size).contiguous(memory_format=torch.channels_last)
    for kind in (ConvBlock, DepthwiseBlock):
        make = partial(kind, 16, 32, pool=pool, latent_size=latent_size)  # type: ignore[arg-type]
        _compare(make, "LLS", x, latent_size, get_backend("auto", CPU))


class _ByHand(torch.optim.SGD):
    """What a library makes of the gradients, whichever way it holds them: no kernel takes a subclass over."""


def _without_biases(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in params if p.dim() > 1]


def _backwards(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return params[::-1]


@pytest.mark.parametrize("choose", [_without_biases, _backwards])
@pytest.mark.parametrize("rule", ["LLS", "LLS_MxM"])
def test_an_optimizer_of_some_parameters_or_in_another_order(choose: Callable[..., Any], rule: str) -> None:
    """Weight and bias of a BatchNorm have one shape: gradients by place would go to the wrong ones unseen."""
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4) % 5
    layers = []
    for kind in (torch.optim.SGD, _ByHand):
        layer = _layer(
            ConvBlock(3, 6, pool="max", latent_size=2),
            rule,
            (6, 8, 8),
            2,
            get_backend("auto", CPU),
            lambda params, kind=kind: kind(choose(params), lr=0.5),  # type: ignore[misc]
        )
        assert isinstance(layer.step, FusedStep)
        for _ in range(2):
            layer.forward(x)
            layer.update(labels)
        layers.append(layer)
    for (name, a), (_, b) in zip(layers[0].tensors(), layers[1].tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


FREEZABLE = ["conv.weight", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("frozen", FREEZABLE)
def test_frozen_parameters_stay_and_the_others_train(frozen: str) -> None:
    x, labels = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(4) % 5
    found = []
    for backend in (get_backend("auto", CPU), None):
        block = ConvBlock(3, 6, pool="max", latent_size=2)
        block.get_parameter(frozen).requires_grad_(False)
        layer = _layer(block, "LLS", (6, 8, 8), 2, backend)
        before = {name: block.get_parameter(name).detach().clone() for name in FREEZABLE}
        layer.forward(x)
        layer.update(labels)
        assert [name for name in FREEZABLE if torch.equal(block.get_parameter(name), before[name])] == [frozen]
        found.append(layer.state_dict()["block"])
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


class _Spoiling(torch.optim.SGD):
    """Writes into the gradients that it is given, as the library's schedule-free optimizers do."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.add_(1.0)


@pytest.mark.parametrize("make", [lambda: ConvBlock(3, 4, latent_size=2), lambda: LinearBlock(192, 8, latent_size=8)])
def test_an_optimizer_may_write_into_its_gradients(make: Callable[[], Block]) -> None:
    """A bias in front of BatchNorm has a gradient of zero, in every step."""
    block = make()
    shape = (4, 8, 8) if isinstance(block, ConvBlock) else (8,)
    layer = _layer(block, "LLS", shape, block.latent_size or 8, reference, lambda owned: _Spoiling(owned, lr=0.1))
    assert isinstance(layer.step, FusedStep)
    biases = {name: p.detach().clone() for name, p in block.named_parameters() if "bias" in name and "norm" not in name}
    for _ in range(3):
        layer.forward(torch.randn(5, 3, 8, 8))
        layer.update(torch.arange(5) % 5)
    assert biases
    for name, before in biases.items():
        assert torch.equal(dict(block.named_parameters())[name], before), name


@pytest.mark.parametrize("rule", [None, Probe])
def test_gradients_that_two_parameters_share_may_be_written_into(rule: Any) -> None:
    make, x, _ = CASES["shifted"]
    layer = made_layer(make(), x, reference, rule=rule)
    assert isinstance(layer.step, FusedStep if rule is None else OpenStep)
    layer.optimizer = _Spoiling(layer.parameters, lr=0.5)
    before = [p.detach().clone() for p in layer.block.parameters()]
    for _ in range(2):
        step_of(layer, x)
    base, change = (p.detach() - start for p, start in zip(layer.block.parameters(), before, strict=True))
    assert float(base.abs().max()) > 0
    torch.testing.assert_close(base, change)
