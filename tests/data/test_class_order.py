"""Micro-batches of few classes: `class_order`, and what engines make of it."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from engine_runs import dataset, trainer
from hypothesis import given
from hypothesis import strategies as st

from unlocked.data import ImageDataset, class_order
from unlocked.kernels.philox import Purpose

order = partial(class_order, purpose=Purpose.SHUFFLE)


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(any),
    classes=st.integers(1, 7),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 3),
)
def test_every_micro_batch_has_so_many_classes_in_equal_parts(
    counts: list[int], classes: int, batch_size: int, seed: int
) -> None:
    classes = min(classes, sum(map(bool, counts)))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    found = order(labels, classes, batch_size, seed, 3)
    assert found.shape == labels.shape
    assert found.dtype == torch.int64
    assert torch.equal(found, order(labels, classes, batch_size, seed, torch.tensor(3)))
    for rows in found.split(batch_size):
        parts = Counter(labels[rows].tolist())
        assert len(parts) == min(classes, len(rows))
        assert max(parts.values()) - min(parts.values()) <= 1
        for label, number in parts.items():  # nobody is there twice while others of its class are not
            visits = Counter(rows[labels[rows] == label].tolist())
            assert max(visits.values()) <= -(-number // counts[label]) + 1


def test_balanced_classes_are_visited_about_once() -> None:
    labels = torch.arange(1000) % 10
    found = order(labels, 2, 20, 0, 0)
    visits = torch.bincount(found, minlength=1000)
    assert int((visits == 1).sum()) > 900
    assert int(visits.max()) == 1 or int((visits > 1).sum()) < 50
    per_class = torch.bincount(labels[found], minlength=10)
    assert int(per_class.max() - per_class.min()) == 0  # ten decks of five pairs
    assert not torch.equal(found, order(labels, 2, 20, 0, 1))
    assert not torch.equal(found, order(labels, 2, 20, 1, 0))
    assert not torch.equal(found, class_order(labels, 2, 20, 0, 0, Purpose.STATISTICS))


@pytest.mark.parametrize("number", [0, 4, -1])
def test_a_number_that_the_labels_do_not_have_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"classes_per_batch is {number}; the labels have 3 classes, give 1 to 3"):
        replace(
            ImageDataset.from_tensors(torch.randn(6, 1, 4, 4), torch.arange(6) % 3 * 2, 5), classes_per_batch=number
        )


def test_engines_agree_and_a_resume_asks_for_the_same(tmp_path: object) -> None:
    train, test = replace(dataset(70), classes_per_batch=2), dataset(40, "test", augment=False)
    plan = {"epochs": 2, "batch_size": 16, "eval_batch_size": 25}
    results = {
        engine: trainer(engine, snapshot_dir=tmp_path, snapshot_every=4).fit(train, eval_data=test, **plan)  # type: ignore[arg-type]
        for engine in ("sequential", "streams")
    }
    assert results["sequential"].weights_sha256 == results["streams"].weights_sha256
    plain = trainer().fit(dataset(70), eval_data=test, **plan)  # type: ignore[arg-type]
    assert plain.weights_sha256 != results["sequential"].weights_sha256
    with pytest.raises(ValueError, match="classes_per_batch"):
        trainer(resume=tmp_path).fit(dataset(70), eval_data=test, **plan | {"epochs": 3})  # type: ignore[arg-type]
