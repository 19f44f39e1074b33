"""Blocks: what they compute, what others read from them, and start values that depend on their key alone."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import (
    Block,
    ConvBlock,
    DepthwiseBlock,
    KeyedDropout,
    LinearBlock,
    OutputBlock,
    initialise,
    keyed_generator,
    small_conv,
    use_average_pools,
)


def _bn(x: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Tensor:
    return F.leaky_relu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True), 0.01)


def test_conv_block_is_convolution_norm_and_leaky_relu_then_its_pool() -> None:
    x = torch.randn(4, 3, 9, 9)
    block = ConvBlock(3, 6, stride=2, padding=2, kernel_size=5, pool="max", latent_size=2)
    activations = _bn(F.conv2d(x, block.conv.weight, block.conv.bias, stride=2, padding=2), block.norm)
    assert torch.equal(block.body(x), activations)
    assert torch.equal(block(x), F.max_pool2d(activations, 2))
    average = ConvBlock(3, 6, pool="average", pool_size=3)
    assert torch.equal(average(x), F.adaptive_avg_pool2d(average.body(x), 3))
    assert (average.pool, average.pool_size, average.negative_slope) == ("average", 3, 0.01)


@pytest.mark.parametrize(("stride", "same_padding", "padding"), [(1, False, 1), (2, False, 2), (2, True, 1)])
def test_depthwise_block(stride: int, same_padding: bool, padding: int) -> None:
    x = torch.randn(4, 3, 8, 8)
    block = DepthwiseBlock(3, 5, stride=stride, same_padding=same_padding)
    middle = _bn(F.conv2d(x, block.depthwise.weight, stride=stride, padding=padding, groups=3), block.norm1)
    assert torch.equal(block(x), _bn(F.conv2d(middle, block.pointwise.weight), block.norm2))


@pytest.mark.parametrize("block_class", [LinearBlock, OutputBlock])
def test_linear_blocks_flatten_in_logical_order(block_class: type[LinearBlock] | type[OutputBlock]) -> None:
    x = torch.randn(4, 3, 2, 5)
    block = block_class(30, 7)
    plain = F.linear(x.reshape(4, -1), block.linear.weight, block.linear.bias)
    expected = _bn(plain, block.norm) if isinstance(block, LinearBlock) else plain
    assert torch.equal(block(x), expected)
    assert torch.equal(block(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("pool", ["none", "max", "mean", "average"])
def test_blocks_keep_the_memory_format(pool: str) -> None:
    block = ConvBlock(4, 8, pool=pool, pool_size=2 if pool == "average" else None, dropout=0.5)  # type: ignore[arg-type]
    dropout = next(m for m in block.modules() if isinstance(m, KeyedDropout))
    dropout.set_key(0, 0, torch.tensor(3))
    x = torch.randn(2, 4, 8, 8)
    plain, last = block(x), block(x.to(memory_format=torch.channels_last))
    assert plain.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-5, check_stride=False)


def test_parameters_lie_in_the_body_in_the_order_they_are_used() -> None:
    names = [key for key, _ in ConvBlock(1, 2).named_parameters()]
    assert names == ["body.conv.weight", "body.conv.bias", "body.norm.weight", "body.norm.bias"]


def test_wrap_takes_any_module() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    block = Block.wrap(module, "mine", latent_size=2)
    assert (block.name, block.latent_size, block.hidden, block.is_output) == ("mine", 2, None, False)
    assert isinstance(module[1], KeyedDropout)
    x = torch.randn(2, 3)
    assert torch.equal(block.eval()(x), module[0](x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool 'median' is not known; valid: none, max, mean, average"),
        ({"pool": "max", "pool_size": 3}, "pool_size 3 does not go with pool 'max'; valid: 2"),
        ({"pool": "none", "pool_size": 2}, "pool_size 2 does not go with pool 'none'; valid: 1"),
        ({"pool": "average", "pool_size": 0}, "valid: a positive side"),
        ({"latent_size": 0}, "latent_size is a positive integer or None, got 0"),
        ({"dropout": 1.5}, "probability"),
        ({"name": ""}, "needs a name"),
    ],
)
def test_bad_options_say_what_is_valid(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvBlock(3, 4, **options)  # type: ignore[arg-type]


def test_a_tail_has_no_parameters() -> None:
    with pytest.raises(ValueError, match=r"the tail has no parameters, got weight, bias"):
        Block("b", nn.Identity(), nn.Linear(2, 2))


class _Bare(nn.Module):
    """A parameter made by hand beside a module that has reset_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 7.0))
        self.linear = nn.Linear(3, 3)


class _Own(nn.Module):
    """A module of one's own: unlike torch.nn.init, `uniform_` fills a tensor in the order of its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 3, 3, 3))

    def reset_parameters(self) -> None:
        self.weight.uniform_()


def _values(block: nn.Module) -> list[Tensor]:
    return [value.clone() for value in block.state_dict().values()]


def test_initialise_depends_on_seed_and_layer_alone() -> None:
    first, second = ConvBlock(3, 8), ConvBlock(3, 8)
    initialise(first, seed=1, layer=2)
    torch.randn(5)
    x = torch.randn(4, 3, 8, 8)
    second(x)  # moves the running statistics
    initialise(second, seed=1, layer=2)
    assert all(torch.equal(a, b) for a, b in zip(_values(first), _values(second), strict=True))
    for seed, layer in [(2, 2), (1, 3), (2, 1)]:
        initialise(second, seed, layer)
        assert not torch.equal(first.conv.weight, second.conv.weight)


def test_initialise_is_torchs_default_distribution() -> None:
    block = ConvBlock(16, 64)
    initialise(block, seed=0, layer=0)
    bound = (16 * 9) ** -0.5  # kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(fan_in)
    weight = block.conv.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert torch.equal(block.norm.weight.detach(), torch.ones(64))


def test_initialise_ignores_the_memory_format_and_leaves_generators_alone() -> None:
    plain = nn.Sequential(ConvBlock(3, 8), _Own())
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(plain.parameters())
    state = torch.get_rng_state()
    for block in (plain, last):
        initialise(block, seed=5, layer=0)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
    assert last[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(parameters, plain.parameters(), strict=True))


def test_initialise_refuses_by_name_what_it_cannot_draw() -> None:
    bare = Block("scaled", _Bare())
    before = _values(bare)
    with pytest.raises(ValueError, match=r"layer scaled can't be drawn anew: .* sets scale of its _Bare \(body\)"):
        initialise(bare, seed=5, layer=0)
    assert all(torch.equal(a, b) for a, b in zip(before, _values(bare), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        lambda: nn.Transformer(8, 2, 1, 1, 16),
        lambda: nn.LSTM(4, 5, num_layers=2),
        lambda: nn.Embedding(7, 3, padding_idx=2),
    ],
    ids=["attention", "encoder", "transformer", "lstm", "embedding"],
)
def test_initialise_draws_what_the_constructor_draws(make: Callable[[], nn.Module]) -> None:
    """In its order too, so that the values themselves are the constructor's under the same generator state."""
    made = make()
    initialise(made, seed=3, layer=1)
    with keyed_generator(3, 1):
        expected = make()
    drawn, constructed = made.state_dict(), expected.state_dict()
    for name, value in constructed.items():
        assert torch.equal(drawn[name] == 0, value == 0), name  # zeros are zeros, and nothing else is
    if not any(list(child.children()) for child in made.children()):  # flat ones draw in the constructor's order
        assert all(torch.equal(drawn[name], value) for name, value in constructed.items())


def test_average_pools_take_the_place_of_max_pools() -> None:
    blocks, plain = small_conv(3, 5, 17, dropout=0.1), small_conv(3, 5, 17, dropout=0.1)
    use_average_pools(blocks)
    x = torch.randn(2, 3, 17, 17)
    for index in (0, 1):
        activations = plain[index].eval().body(x)
        pooled = blocks[index].eval()(x)
        assert torch.equal(pooled, F.avg_pool2d(activations, 2))
        assert pooled.shape == plain[index].eval()(x).shape
        x = pooled
    with pytest.raises(ValueError, match=r"no max pools"):
        use_average_pools(blocks)
