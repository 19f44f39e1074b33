"""unlocked.kernels.philox against the known-answer vectors published with Random123, and its keys and uniforms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.kernels.philox import Purpose, keyed_uniform, philox4x32, philox_int
from unlocked.models.dropout import KeyedDropout

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _tensors(text: str) -> list[Tensor]:
    return [torch.tensor(word) for word in _words(text)]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c, k = _tensors(counter), _tensors(key)
    result = philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert [int(word) for word in result] == _words(expected)


def test_a_batch_of_counters_gives_each_counter_its_own_words() -> None:
    columns = [torch.tensor(column) for column in zip(*(_words(vector[0]) for vector in VECTORS), strict=True)]
    keys = [torch.tensor(column) for column in zip(*(_words(vector[1]) for vector in VECTORS), strict=True)]
    result = torch.stack(philox4x32((columns[0], columns[1], columns[2], columns[3]), (keys[0], keys[1])), dim=1)
    assert result.tolist() == [_words(vector[2]) for vector in VECTORS]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(list(Purpose)),
)
@settings(max_examples=50, deadline=None)
def test_uniforms_are_the_upper_24_bits_of_the_words(
    seed: int, counter: int, major: int, minor: int, purpose: Purpose
) -> None:
    low, high = torch.tensor(counter & 0xFFFFFFFF), torch.tensor(counter >> 32)
    key = (torch.tensor(seed), torch.tensor(int(purpose)))
    words = philox4x32((low, high, torch.tensor(major), torch.tensor(minor)), key)
    uniforms = keyed_uniform(seed, purpose, torch.tensor(counter), major, minor)
    assert uniforms.double().tolist() == [(int(word) >> 8) / 2**24 for word in words]


def test_every_part_of_the_key_changes_the_numbers() -> None:
    index = torch.arange(64)
    base = keyed_uniform(1, Purpose.AUGMENT, index, 2, 3)
    others = [
        keyed_uniform(1 + 2**32, Purpose.AUGMENT, index, 2, 3),
        keyed_uniform(-1, Purpose.AUGMENT, index, 2, 3),
        keyed_uniform(1, Purpose.DROPOUT, index, 2, 3),
        keyed_uniform(1, Purpose.AUGMENT, index + 2**32, 2, 3),
        keyed_uniform(1, Purpose.AUGMENT, index, 3, 3),
        keyed_uniform(1, Purpose.AUGMENT, index, 2, 4),
    ]
    for other in others:
        assert not torch.isin(other, base).any()
    assert torch.equal(base, keyed_uniform(1, Purpose.AUGMENT, index, torch.tensor(2), 3))
    assert torch.equal(base[40], keyed_uniform(1, Purpose.AUGMENT, torch.tensor(40), 2, 3))


@pytest.mark.parametrize("high", [0, 1, 768, 2**31 - 1])
def test_counting_from_a_high_word_on_is_a_longer_counter(high: int) -> None:
    index = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32])
    expected = keyed_uniform(3, Purpose.DROPOUT, index + high * 2**32, 2, 1)
    assert torch.equal(keyed_uniform(3, Purpose.DROPOUT, index, 2, 1, high=high), expected)


def test_uniforms_are_spread_evenly() -> None:
    """65536 draws; the bounds are five standard deviations of the exact distribution, and the draws are fixed."""
    draws = keyed_uniform(7, Purpose.SHUFFLE, torch.arange(16384), 0).double()
    count = draws.numel()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / count) ** 0.5
    bins = torch.histc(draws, 256, 0, 1)
    chi_square = ((bins - count / 256) ** 2 / (count / 256)).sum()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    correlation = torch.corrcoef(draws.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 16384**0.5


def test_integers_have_63_bits_and_depend_on_seed_purpose_and_counter() -> None:
    values = {philox_int(seed, purpose, step) for seed in (-1, 0, 1, 2**40) for purpose in Purpose for step in range(4)}
    assert len(values) == 4 * len(Purpose) * 4
    assert all(0 <= value < 2**63 for value in values)
    assert max(values) > 2**62


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_numbers_on_the_device_and_in_a_captured_graph() -> None:
    """Nothing is copied from the host or read back, and a graph follows the epoch that lies on the device."""
    index = torch.arange(1000, device="cuda") * 2**31
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")
    keyed_uniform(5, Purpose.DROPOUT, index, epoch, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draws = keyed_uniform(5, Purpose.DROPOUT, index, epoch, 1)
    for step in range(3):
        epoch.fill_(step)
        graph.replay()
        assert torch.equal(draws.cpu(), keyed_uniform(5, Purpose.DROPOUT, index.cpu(), step, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_compiled_dropout_draws_the_same_mask(index: int) -> None:
    """Of every index: where numbers of over 32 bits met an arange, the compiler's code for the GPU failed."""
    dropout = KeyedDropout(0.3, index=index)
    dropout.set_key(7, 2, torch.tensor(4, device="cuda"))
    x = torch.ones(9, 65, device="cuda")
    assert torch.equal(torch.compile(dropout)(x), dropout(x))
