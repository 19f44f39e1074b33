"""The closed form of every kind of block, at sizes of all kinds, against autograd."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.kernels import reference
from unlocked.kernels.dispatch import get_backend
from unlocked.models import Block, ConvBlock, DepthwiseBlock, LinearBlock, initialise
from unlocked.rules import LLS, LayerInfo, LLS_MxM, LocalLosses
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.layer import Layer

CPU = torch.device("cpu")
RULES = {"LLS": LLS(), "LLS_MxM": LLS_MxM(label_smoothing=0.1), "LocalLosses": LocalLosses(temperature=2.0)}


def _layer(block: Block, rule: str, shape: tuple[int, ...], latent_size: int, backend: object) -> Layer:
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
    return Layer(block, RULES[rule](info), info, partial(torch.optim.SGD, lr=0.5), device=CPU, step=step)


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
    pool=st.sampled_from([("none", None), ("max", None), ("average", 1), ("average", 2), ("average", 4)]),
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
