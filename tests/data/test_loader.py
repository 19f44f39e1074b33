"""A loader's sizes, found out beforehand; and what is not a batch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from unlocked.data import LoaderDataset

DATA = TensorDataset(torch.rand(23, 2, 5, 5), torch.arange(23) % 4)


def named(value: object) -> str:
    """A parameter's name in the list of tests: the same in every process, so without addresses and random numbers."""
    return str(value) if isinstance(value, str | int | dict) else type(value).__name__


def batch(rows: int = 8, **changes: Any) -> tuple[Any, Any]:
    return changes.get("samples", torch.rand(rows, 3)), changes.get("labels", torch.zeros(rows, dtype=torch.int64))


class Sized:
    """Iterable with a length, and neither a DataLoader nor a sequence."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return (batch(rows) for rows in self.rows)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(DATA)


@pytest.mark.parametrize(
    ("loader", "options", "sizes"),
    [
        (DataLoader(DATA, 8), {}, (8, 23)),
        (DataLoader(DATA, 8, shuffle=True), {}, (8, 23)),
        (DataLoader(DATA, 8, drop_last=True), {}, (8, 16)),
        (DataLoader(DATA, 100), {}, (23, 23)),
        (DataLoader(DATA, 8), {"steps_per_epoch": 2}, (8, 16)),
        (DataLoader(DATA, 8), {"steps_per_epoch": 3}, (8, 23)),
        (DataLoader(DATA, 8, sampler=RandomSampler(DATA, num_samples=13)), {}, (8, 13)),
        (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 8, False)), {}, (8, 23)),
        (DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 8, True)), {}, (8, 16)),
        (DataLoader([batch(8), batch(8)], batch_size=None), {}, (8, 16)),
        (DataLoader(Stream(), 8), {"steps_per_epoch": 2}, (8, 16)),
        (DataLoader(Stream(), 8), {"steps_per_epoch": 3, "num_samples": 23}, (8, 23)),
        ([batch(8), batch(8), batch(5)], {}, (8, 21)),
        ([batch(8)], {}, (8, 8)),
        (Sized(8, 8), {}, (8, 16)),
        (Sized(8, 8, 5), {"num_samples": 21}, (8, 21)),
        (iter([batch(8), batch(8)]), {"steps_per_epoch": 2}, (8, 16)),
    ],
    ids=lambda value: (
        type(value).__name__ if hasattr(value, "__iter__") and not isinstance(value, tuple) else str(value)
    ),
)
def test_sizes(loader: Any, options: dict[str, int], sizes: tuple[int, int]) -> None:
    data = LoaderDataset.wrap(loader, **options)
    assert (data.batch_size, data.num_samples) == sizes
    assert len(data) == sizes[1]
    assert data.image_shape in ((2, 5, 5), (3,))
    rows = [len(samples) for samples, _ in data.batches(0)]
    assert sum(rows) >= data.num_samples, "looking at a batch takes none away"


def test_looking_at_a_data_loader_does_not_disturb_its_order() -> None:
    def order(wrapped: bool) -> list[int]:
        loader = DataLoader(DATA, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        if wrapped:
            LoaderDataset.wrap(loader)
        return torch.cat([labels for _, labels in loader]).tolist()

    before = torch.random.get_rng_state()
    assert order(True) == order(False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_depends_on_the_epoch_alone_is_known() -> None:
    class Keyed(RandomSampler):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    seeded = DataLoader(DATA, 8, shuffle=True, generator=torch.Generator())
    keyed = DataLoader(DATA, 8, sampler=Keyed(DATA))
    stays = DataLoader(DATA, 8, num_workers=1, persistent_workers=True)
    loaders = (seeded, stays, keyed, DataLoader(DATA, 8), DataLoader(DATA, 8, num_workers=1), [batch()])
    assert [LoaderDataset.wrap(loader).is_keyed for loader in loaders] == [False, False, True, True, True, True]
    LoaderDataset.wrap(keyed).batches(7)
    assert keyed.sampler.epoch == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "its own"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_that_is_passed_over_draws_what_one_that_is_read_does(workers: int, own: bool) -> None:
    def drawn(over: bool) -> torch.Tensor:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0) if own else torch.default_generator
        loader = DataLoader(DATA, 8, generator=generator if own else None, num_workers=workers)
        data = LoaderDataset.wrap(loader)
        for epoch in range(2):
            if over:
                data.pass_over(epoch)
            else:
                assert len(list(data.batches(epoch))) == 3
        return generator.get_state()

    assert torch.equal(drawn(True), drawn(False))
    assert not torch.equal(drawn(True), torch.Generator().manual_seed(0).get_state())


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ((batch() for _ in range(2)), {}, r"\(generator\) has no length; give steps_per_epoch"),
        (DataLoader(Stream(), 8), {}, "has no length; give steps_per_epoch"),
        ([], {}, r"the test data \(list\) has no batches"),
        (DataLoader(DATA, 8, drop_last=True, sampler=RandomSampler(DATA, num_samples=5)), {}, "has no batches"),
        (DataLoader(DATA, 8), {"steps_per_epoch": 4}, "steps_per_epoch is 4; the test data has 3 batches"),
        (DataLoader(DATA, 8), {"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        (Sized(8, 8, 5), {"num_samples": 30}, "yields 3 batches of 8 rows an epoch, which can't be 30 samples"),
        (iter([]), {"steps_per_epoch": 1}, "gives no batch: StopIteration"),
        (DataLoader(DATA, 8, sampler=DistributedSampler(DATA, 2, 0)), {}, "stage 0 reads for all stages"),
        ([(torch.zeros(8, 3), "one", "two")], {}, r"a batch is \(samples, labels\).*got a tuple of 3"),
        ([{"x": 1, "y": 2, "z": 3}], {}, r"\[B, ...\] with no size 0, got torch.int64 \[\]"),
        ([{"x": torch.zeros(8, 3), "y": object()}], {}, "the test data, y: a batch is .*got a dict of 2"),
        ([{"labels": torch.zeros(8)}], {}, "no input, only labels"),
        ([{"x": torch.zeros(8, 3), "y": torch.zeros(7)}], {}, r"y has the shape \[7\], x \[8, 3\]"),
        (
            [{"input_ids": torch.zeros(8, 3, dtype=torch.int64), "attention_mask": torch.ones(8, 4)}],
            {},
            r"attention_mask has the shape \[8, 4\], input_ids \[8, 3\]; a mask has a value for every position",
        ),
        ([{"x": torch.zeros(8, 3)}], {"main": "ids"}, "no key 'ids' for its main input; there is x"),
        ([batch(samples=torch.zeros(8, 3, dtype=torch.bool))], {}, r"float, uint8 or .*got torch.bool \[8, 3\]"),
        ([batch(samples=torch.zeros(8))], {}, r"\[B, ...\] with no size 0, got torch.float32 \[8\]"),
        ([batch(labels=torch.zeros(7, dtype=torch.int64))], {}, r"got torch.int64 \[7\]"),
    ],
    ids=named,
)
def test_what_is_no_batch_is_said_beforehand(loader: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderDataset.wrap(loader, split="test", **options)


def test_arrays_are_batches_too() -> None:
    data = LoaderDataset.wrap([(np.zeros((4, 3)), [0, 1, 2, 0])], num_classes=3)
    samples, _, labels = data.check(next(data.batches(0)), 4, "here")
    assert (samples.dtype, labels.tolist()) == (torch.float64, [0, 1, 2, 0])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (batch(4), "here: 4 samples where 8 are due"),
        (batch(samples=torch.zeros(8, 4)), r"here: samples have shape \(4,\), those before \(3,\)"),
        (batch(labels=torch.full((8,), 3)), "here: labels from 3 to 3; valid: 0 to 2"),
        (batch(labels=torch.full((8,), -1)), "here: labels from -1 to -1; valid: 0 to 2"),
        (
            batch(samples=torch.zeros(8, 3, dtype=torch.int32)),
            "here: samples are torch.int32, those before",
        ),
        ((torch.zeros(8, 3),), "here: beside the samples the batch has nothing, those before had targets"),
        (batch(labels=torch.zeros(8)), r"here: targets are torch.float32 \[\] per sample, those before torch.int64"),
    ],
    ids=named,
)
def test_a_batch_unlike_those_before_is_named(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderDataset.wrap([batch()], num_classes=3).check(made, 8, "here")
