"""A step made of what a block computes, against float64 autograd: random blocks, and every operation of the table."""

from collections.abc import Callable
from typing import Any

import joining_backend
import pytest
import torch
from block_modules import Residual
from graph_blocks import CASES, TURNED, assert_close_to_float64, made_layer, random_block, step_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.kernels import cpp, reference
from unlocked.models import Block, ConvBlock, LinearBlock
from unlocked.workers.graph import (
    attention,
    autograd,
    body,
    gelu,
    grouped,
    normalized,
    operations,
    pools,
    products,
    shapes,
    standardized,
    sums,
)


@given(seed=st.integers(0, 2**31 - 1), tokens=st.booleans(), backend=st.sampled_from([cpp, reference, joining_backend]))
@settings(max_examples=40)
def test_random_blocks(seed: int, tokens: bool, backend: Any) -> None:
    """Channels, sizes, groups, biases, skips, frozen parts: whatever comes out. In float32 another value of a few may
    be the largest in its window, or be above zero; an operation too few or too many would be off by far more."""
    make, x = random_block(seed, tokens=tokens)
    assert_close_to_float64(make, x, backend, limit=3e-2)


@pytest.mark.parametrize("name", CASES)
def test_every_operation_of_the_table(name: str) -> None:
    make, x, joined = CASES[name]
    tested = assert_close_to_float64(make, x, cpp)
    hows = {how for how, _, _ in tested.step.body.rows}
    assert "autograd" not in hows
    assert ("joined" in hows) == joined


def test_what_attention_reads_may_be_made_by_autograd() -> None:
    assert_close_to_float64(*TURNED, cpp)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
@pytest.mark.parametrize(
    "name",
    ["residual", "summed", "encoder", "encoder's layer", "gelu of images", "pooled", "pooled inside", "depthwise"],
)
def test_interpreted_triton_too(name: str) -> None:
    triton = pytest.importorskip("unlocked.kernels.triton")
    make, x, joined = CASES[name]
    tested = assert_close_to_float64(make, x, triton)
    assert ("joined" in {how for how, _, _ in tested.step.body.rows}) == joined


OPERATIONS = {
    operations.Convolution: "conv1d",
    products.Linear: "linear",
    products.Product: "encoder's layer, norms after",
    gelu.Gelu: "gelu",
    gelu.GeluLinear: "encoder's layer",
    gelu.Silu: "silu of images",
    grouped.Grouped: "group",
    grouped.GroupedEnd: "group, SiLU, at the end",
    operations.LayerNorm: "encoder's layer",
    operations.GroupNorm: "group without weights",
    operations.Elementwise: "Tanh5",
    operations.Pool: "pools",
    pools.HalvingPool: "pooled inside",
    operations.Flatten: "flat",
    operations.Add: "encoder",
    attention.Attention: "chunks of many tokens",
    attention.SplitAttention: "attention of many tokens",
    standardized.ScaledLinear: "encoder",
    standardized.ScaledProduct: "encoder's layer",
    sums.SumEnd: "residual",
    shapes.Split: "chunks",
    shapes.Moved: "attention",
    shapes.Reshaped: "chunks",
    operations.Dropout: "dropout",
    normalized.Normalized: "residual",
    normalized.NormalizedEnd: "plain",
    normalized.ConvolvedEnd: "plain",
    normalized.UnevenEnd: "uneven",
    body.PlainEnd: "encoder",
    autograd.Read: "parameter",
}


def test_no_operation_is_left_out() -> None:
    kinds = [
        one
        for module in (
            operations,
            products,
            gelu,
            grouped,
            shapes,
            attention,
            normalized,
            standardized,
            sums,
            pools,
            body,
            autograd,
        )
        for one in vars(module).values()
    ]
    found = {one for one in kinds if isinstance(one, type) and issubclass(one, operations.Operation)}
    # No way back of their own.
    others = {operations.Operation, operations.Replaceable, autograd.AutogradPiece, shapes.Sizes, shapes._Filled}
    others.add(standardized.Standardized)
    assert found - others == OPERATIONS.keys()


@pytest.mark.parametrize("kind", OPERATIONS)
def test_an_error_in_any_way_back_is_found(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in fifty, of every gradient that it gives."""
    original = kind.backward  # type: ignore[attr-defined]

    def wrong(self: Any, grad: Any, wanted: Any) -> Any:
        inputs, parameters = original(self, grad, wanted)
        return [g if g is None else 1.02 * g for g in inputs], [g if g is None else 1.02 * g for g in parameters]

    make, x, _ = CASES[OPERATIONS[kind]]
    backend = joining_backend if kind is normalized.ConvolvedEnd else cpp
    assert_close_to_float64(make, x, backend)
    monkeypatch.setattr(kind, "backward", wrong)
    with pytest.raises(AssertionError):
        assert_close_to_float64(make, x, backend, limit=1e-2)


def _chain(*before: Callable[[], nn.Module], groups: int = 1, frozen: bool = False, rows: int = 3) -> Block:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (rows, 3), padding=(rows // 2, 0), stride=(1, 2), groups=groups)
    conv.weight.requires_grad_(not frozen)
    return Block(
        "chain",
        nn.Sequential(*(make() for make in before), conv, nn.BatchNorm2d(6), nn.ReLU()),
        nn.MaxPool2d(2),
        latent_size=2,
    )


@pytest.mark.parametrize(
    ("make", "joins"),
    [
        (_chain, True),
        (lambda: _chain(groups=2), False),
        (lambda: _chain(frozen=True), False),
        (lambda: _chain(rows=5), False),  # 60 elements of a kernel, and the backend joins up to 40
        (lambda: _chain(lambda: nn.Conv2d(4, 4, 1)), False),  # asks for the gradient of the last one's input
        (lambda: _chain(nn.ReLU), False),
    ],
)
def test_a_convolution_joins_the_end_where_its_weight_gradient_is_all_that_is_asked_for(
    make: Callable[[], Block], joins: bool
) -> None:
    x = torch.randn(4, 4, 8, 9).contiguous(memory_format=torch.channels_last)
    tested = assert_close_to_float64(make, x, joining_backend)
    _, covered, why = tested.step.body.rows[-1]
    assert isinstance(tested.step.body.end, normalized.ConvolvedEnd) == joins
    assert ("weight gradient" in why) == joins
    assert any(name.isdigit() for name in covered)
    apart = assert_close_to_float64(make, x, reference)
    for (name, a), (_, b) in zip(tested.tensors(), apart.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


class _Own(nn.Module):
    """Somebody's convolution, normalisation and activation, by a forward() of their own."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(self.norm(self.conv(x)), 0.01)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(0.01, True)),
    "own": lambda: _Own(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pool", ["none", "max", "mean", "average"])
@pytest.mark.parametrize("form", FORMS)
def test_what_computes_the_same_has_the_same_bits(form: str, pool: str, precision: str) -> None:
    x = torch.randn(6, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    tails = {"none": None, "max": nn.MaxPool2d(2), "mean": nn.AvgPool2d(2), "average": nn.AdaptiveAvgPool2d(4)}
    ours = ConvBlock(3, 8, pool=pool, pool_size=4 if pool == "average" else None, latent_size=2)  # type: ignore[arg-type]
    theirs = Block("conv", FORMS[form](), tails[pool], latent_size=2)
    for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        a.copy_(b)
    _assert_equal_bits(ours, theirs, x, precision)


def test_flat_blocks_have_the_same_bits_too() -> None:
    ours = LinearBlock(48, 16, latent_size=16)
    theirs = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.BatchNorm1d(16), nn.LeakyReLU())
    theirs.load_state_dict({key.removeprefix("body."): value for key, value in _numbered(ours).items()})
    _assert_equal_bits(ours, Block("linear", theirs, latent_size=16), torch.randn(6, 3, 4, 4), "fp32")


def _numbered(block: Block) -> dict[str, Tensor]:
    places = {name: str(place) for place, (name, _) in enumerate(block.body.named_children())}
    state = block.body.state_dict()
    return {".".join((places[key.split(".")[0]], key.split(".")[1])): value for key, value in state.items()}


def _assert_equal_bits(ours: Block, theirs: Block, x: Tensor, precision: str) -> None:
    layers = [made_layer(block, x, cpp, precision=precision) for block in (ours, theirs)]
    for _ in range(2):
        outputs = [step_of(layer, x) for layer in layers]
        assert torch.equal(*outputs)
    for (name, a), (_, b) in zip(*(layer.tensors() for layer in layers), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "name",
    [
        "residual",
        "encoder",
        "pooled",
        "conv1d",
        "group",
        "group, GELU, at the end",
        "silu",
        "attention",
        "summed",
        "turned",
    ],
)
def test_bfloat16_stays_near(name: str) -> None:
    """Every product's inputs are off by 2**-9, and so is whatever is stored."""
    make, x = TURNED if name == "turned" else CASES[name][:2]
    single, half = (made_layer(make(), x, cpp, precision=precision) for precision in ("fp32", "bf16"))
    before = [p.detach().clone() for p in single.parameters]
    outputs = [step_of(layer, x).float() for layer in (single, half)]
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.03
    for start, a, b in zip(before, single.parameters, half.parameters, strict=True):
        if float((a.detach() - start).norm()) > 1e-3:
            assert float((b - a).detach().norm() / (a.detach() - start).norm()) < 0.25


def test_a_normalisation_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.norm(self.conv(torch.relu(self.norm(self.conv(x))))))

    def make() -> Block:
        torch.manual_seed(0)
        return Block.wrap(Twice(), "twice", latent_size=2)

    tested = assert_close_to_float64(make, torch.randn(6, 3, 8, 8), cpp)
    assert int(dict(tested.tensors())["layer.block.body.norm.num_batches_tracked"]) == 2


def test_nothing_of_a_micro_batch_outlives_its_update() -> None:
    make, x, _ = CASES["residual"]
    layer = made_layer(make(), x, cpp)
    step_of(layer, x)
    step_of(layer, x)
    held = [
        (type(call.operation).__name__, name)
        for call in layer.step.body.calls
        for name, value in vars(call.operation).items()
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.numel() >= len(x) * 8
    ]
    assert held == []
    assert isinstance(make().body, Residual)
