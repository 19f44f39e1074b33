"""Keyed dropout: the mask is a function of its key and of the element's place, and of nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.kernels.philox import Purpose, keyed_uniform
from unlocked.models import ConvBlock, KeyedDropout, replace_dropout, set_dropout_keys
from unlocked.models.dropout import kept_dropout_keys


def _dropout(p: float = 0.5, seed: int = 1, layer: int = 2, microbatch: int = 3, **options: int) -> KeyedDropout:
    dropout = KeyedDropout(p, **options)  # type: ignore[arg-type]
    dropout.set_key(seed, layer, torch.tensor(microbatch))
    return dropout


@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    p=st.floats(0.0, 1.0, allow_subnormal=False),
    key=st.tuples(st.integers(0, 2**40), st.integers(0, 50), st.integers(0, 2**31)),
)
def test_every_element_is_kept_or_zeroed_by_its_own_draw(shape: list[int], p: float, key: tuple[int, int, int]) -> None:
    seed, layer, microbatch = key
    output = _dropout(p, seed, layer, microbatch)(torch.ones(shape)).flatten()
    for element in range(output.numel()):
        draws = keyed_uniform(seed, Purpose.DROPOUT, torch.tensor(element // 4), microbatch, layer)
        kept = p == 0.0 or draws[element % 4].item() >= torch.tensor(p).item()
        assert output[element].item() == pytest.approx(1.0 / (1.0 - p) if kept and p < 1.0 else 0.0)


def test_share_and_scale() -> None:
    output = _dropout(0.3)(torch.ones(400, 500))
    share = (output == 0).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.005)  # five standard deviations
    assert output.max().item() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("per_channel", [False, True])
def test_memory_format_does_not_matter_and_is_kept(per_channel: bool) -> None:
    x = torch.rand(3, 5, 4, 6) + 0.1
    plain = _dropout(per_channel=per_channel)(x)
    last = _dropout(per_channel=per_channel)(x.to(memory_format=torch.channels_last))
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_the_key_is_read_when_the_mask_is_made() -> None:
    x = torch.ones(64, 64)
    microbatch = torch.tensor(7)
    dropout = KeyedDropout(0.5)
    dropout.set_key(0, 0, microbatch)
    first = dropout(x)
    microbatch += 1
    second = dropout(x)
    microbatch -= 1
    assert torch.equal(first, dropout(x))
    assert not torch.equal(first, second)


def test_seed_layer_and_index_have_masks_of_their_own() -> None:
    x = torch.ones(64, 64)
    masks = [_dropout(seed=s, layer=n, index=i)(x) for s, n, i in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            assert ((a > 0) == (b > 0)).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_gradient_passes_through_the_same_mask() -> None:
    x = torch.ones(8, 8, requires_grad=True)
    output = _dropout()(x)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, output.detach())


def test_per_channel_drops_whole_channels() -> None:
    output = _dropout(per_channel=True)(torch.ones(16, 16, 3, 3))
    flat = output.flatten(2)
    assert torch.equal(flat.amin(2), flat.amax(2))
    assert 0.3 < (flat[:, :, 0] == 0).float().mean() < 0.7


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_identity_without_a_key(p: float, training: bool) -> None:
    x = torch.randn(3, 4)
    assert KeyedDropout(p).train(training)(x) is x


@pytest.mark.parametrize(
    ("plain", "shape"),
    [
        (nn.Dropout(0.3), (4, 5)),
        (nn.Dropout(1.0), (4, 5)),
        (nn.Dropout1d(0.3), (4, 5, 6)),
        (nn.Dropout2d(0.3), (4, 5, 3, 2)),
        (nn.Dropout3d(0.3), (4, 5, 3, 2, 2)),
    ],
)
def test_without_a_key_it_draws_as_the_module_whose_place_it_takes(plain: nn.Module, shape: tuple[int, ...]) -> None:
    keyed = replace_dropout(plain)
    assert isinstance(keyed, nn.Dropout)  # whoever looks for dropout finds it
    x = torch.randn(shape)
    torch.manual_seed(0)
    expected = [plain(x), plain(x)]
    torch.manual_seed(0)
    assert all(torch.equal(keyed(x), one) for one in expected)


def test_a_mask_needs_a_key_and_a_key_is_lent() -> None:
    dropout, x = KeyedDropout(0.5), torch.ones(64, 64)
    with pytest.raises(ValueError, match="set_key"):
        dropout.mask(x)
    with kept_dropout_keys([nn.Sequential(dropout)]):
        dropout.set_key(0, 0, 0)
        first = dropout(x)
        with kept_dropout_keys([dropout]):
            dropout.set_key(0, 0, 1)
            assert not torch.equal(dropout(x), first)
        assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), dropout(x))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_p_is_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        KeyedDropout(p)


def test_replace_dropout_at_every_depth() -> None:
    inner = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(1, 1, 1), nn.Dropout(0.2))
    model = nn.Sequential(inner, KeyedDropout(0.3), nn.ModuleDict({"a": nn.Dropout1d(0.4)}))
    assert replace_dropout(model) is model
    found = [m for m in model.modules() if isinstance(m, KeyedDropout)]
    assert [(m.p, m.per_channel, m.index) for m in found] == [
        (0.1, True, 0),
        (0.2, False, 1),
        (0.3, False, 2),
        (0.4, True, 3),
    ]
    assert all(type(m) is KeyedDropout for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    assert isinstance(replace_dropout(nn.Dropout(0.5)), KeyedDropout)


def test_what_computes_something_else_stays() -> None:
    class Doubled(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.AlphaDropout(), Doubled())
    kinds = [type(m) for m in model]
    assert [type(m) for m in replace_dropout(model)] == kinds  # type: ignore[attr-defined]


def test_set_dropout_keys_reaches_a_block() -> None:
    block = ConvBlock(1, 4, pool="max", dropout=0.5)
    x = torch.randn(2, 1, 4, 4)

    def run(microbatch: int) -> Tensor:
        set_dropout_keys(block, seed=0, layer=1, microbatch=torch.tensor(microbatch))
        return block(x)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
