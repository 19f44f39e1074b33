"""Training from a DataLoader or an iterable: the numbers are those of what it yields, in every engine."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import loader_worker
import numpy as np
import pytest
import torch
from loader_worker import FAULTS, PAIRS, WITHOUT_WORKERS, fit, pair, samples, seeded
from ranks import ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from unlocked.data import ImageDataset, LoaderDataset
from unlocked.kernels.images import load_batch
from unlocked.rules import LLS
from unlocked.runtime import Processes, Trainer
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.errors import StageError
from unlocked.workers.source import BatchSource

ENGINES = ["sequential", "streams"]


class Replay:
    """Yields, epoch by epoch, the very batches that a resident dataset gives: the truth is the run from that."""

    def __init__(self, train: ImageDataset, test: ImageDataset, kind: str) -> None:
        self.source = BatchSource(train, test, seed=5, batch_size=16, eval_batch_size=25, load_batch=load_batch)
        self.plan = StreamPlan(
            epochs=2, train_size=70, batch_size=16, eval_size=40, eval_batch_size=25, statistics_batches=0
        )
        self.kind, self.epoch = kind, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return {"train": 5, "evaluate": 2}[self.kind]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        items = [item for item in self.plan if item.kind == self.kind and item.epoch == max(self.epoch, 0)]
        return (self.source.load(item) for item in items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return list(self)[index]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loader_of_the_same_batches_gives_the_same_weights(engine: str) -> None:
    """Partial last batches, a new order every epoch, evaluation."""

    train, test = (
        ImageDataset.from_tensors(*samples(n), 5, split=s, flip=True) for n, s in ((70, "train"), (40, "test"))
    )
    expected = fit(train, test, batch_size=16, eval_batch_size=25, statistics_batches=0)
    loaders = [
        LoaderDataset.wrap(Replay(train, test, kind), num_samples=rows, split=split)
        for kind, rows, split in (("train", 70, "train"), ("evaluate", 40, "test"))
    ]
    got = fit(*loaders, engine, statistics_batches=0)
    assert got.weights_sha256 == expected.weights_sha256
    assert [e.eval_loss for e in got.epochs] == [e.eval_loss for e in expected.epochs]
    mixed = fit(loaders[0], test, engine, eval_batch_size=25, statistics_batches=0, prefetch=0)
    assert mixed.weights_sha256 == expected.weights_sha256


@pytest.mark.alone
def test_a_data_loader_trains_alike_in_every_engine(tmp_path: Path) -> None:
    train, test = TensorDataset(*samples(70)), DataLoader(TensorDataset(*samples(40)), 25)
    expected = fit(seeded(train), test)
    assert expected.steps == 10
    for engine, prefetch in (("streams", None), ("sequential", 0), ("sequential", 7)):
        got = fit(seeded(train), test, engine, prefetch=prefetch)
        assert got.weights_sha256 == expected.weights_sha256, (engine, prefetch)
        assert [e.eval_loss for e in got.epochs] == [e.eval_loss for e in expected.epochs]
    with ranks(2, [loader_worker.__file__, str(tmp_path)]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["sha256"] == expected.weights_sha256
    # Every process looks at one sample to learn its shape; the rest is stage 0's business.
    assert second["read"] == [1, 1]
    assert first["read"] == [1 + 2 * (70 + 32), 1 + 2 * 40]


def test_a_data_loader_may_have_workers() -> None:
    train = TensorDataset(*samples(70))
    got = fit(seeded(train, workers=1), epochs=1)
    assert got.weights_sha256 == fit(seeded(train), epochs=1).weights_sha256


def test_bytes_are_divided_by_255_as_those_of_a_dataset_are() -> None:
    images, labels = samples(64)
    of_bytes = fit([(images[:32], labels[:32]), (images[32:], labels[32:])])
    floats = images.float() * (1.0 / 255.0)
    of_doubles = fit([(floats[:32].double(), labels[:32].int()), (floats[32:].double(), labels[32:].int())])
    assert of_bytes.weights_sha256 == of_doubles.weights_sha256


def test_an_iterator_goes_on_where_it_stopped() -> None:
    images, labels = samples(96)
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, 96, 16)]
    got = fit(iter(batches), steps_per_epoch=3)
    assert got.weights_sha256 == fit(batches, epochs=1).weights_sha256
    with pytest.raises(StageError, match=r"train micro-batch 0 of epoch 2 .*: the loader ended, 3 batches are due"):
        fit(iter(batches), steps_per_epoch=3, epochs=3)


def test_vectors_and_sequences_are_samples_too() -> None:
    net = [nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU()), nn.Linear(8, 3)]
    for shape in ((12,), (4, 3), (2, 2, 3)):
        batches = [(torch.rand(8, *shape), torch.arange(8) % 3) for _ in range(3)]
        trainer = Trainer(net, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), engine="streams")
        assert trainer.fit(batches, epochs=1).steps == 3


class Keyed(RandomSampler):
    """A new order for every epoch number."""

    def __init__(self, data: TensorDataset, seed: int) -> None:
        super().__init__(data)
        self.seed, self.epoch, self.given = seed, 0, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for index in order.tolist():
            self.given += 1
            yield index


def keyed() -> DataLoader:
    data = TensorDataset(*samples(70))
    return DataLoader(data, 16, sampler=Keyed(data, 3))


@pytest.mark.parametrize("make", [partial(seeded, TensorDataset(*samples(70))), keyed], ids=["seeded", "keyed"])
@pytest.mark.parametrize("steps", [3, 8])
def test_a_resumed_run_skips_what_is_done(make: Callable[[], DataLoader], steps: int, tmp_path: Path) -> None:
    """From the middle of the first epoch, and of the second."""
    test = DataLoader(TensorDataset(*samples(40)), 25)
    expected = fit(make(), test)
    options = {"snapshot_every": steps, "snapshot_dir": tmp_path}
    whole = fit(make(), test, **options)
    assert whole.weights_sha256 == expected.weights_sha256
    for folder in sorted(tmp_path.glob("step-*"))[1:]:
        (folder / "manifest.json").unlink()
    loader = make()
    got = fit(loader, test, resume=tmp_path, **options)
    assert got.weights_sha256 == expected.weights_sha256
    if isinstance(loader.sampler, Keyed):
        # Of the epoch that the run was in, and of the whole second one; and twice the statistics' micro-batches. Of the
        # epoch before one micro-batch, by which it is seen that reading moves no generator.
        assert loader.sampler.given == {3: 2 * 70 + 2 * 32, 8: 16 + 70 + 32}[steps]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_resumed_run_finds_every_generator_where_it_was(kind: str, tmp_path: Path) -> None:
    """From the middle of the first epoch of three, of the second, and of the third."""
    options: dict[str, Any] = {"snapshot_every": 4, "snapshot_dir": tmp_path, "epochs": 3}
    expected = fit(*pair(kind), **options)
    for folder in sorted(tmp_path.glob("step-*"), reverse=True):
        got = fit(*pair(kind), resume=folder, **{**options, "snapshot_dir": None, "snapshot_every": 0})
        assert got.weights_sha256 == expected.weights_sha256, folder.name
        assert got.epochs[-1].eval_loss == expected.epochs[-1].eval_loss, folder.name


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if "stays" not in kind])
def test_a_run_is_resumed_in_the_process_that_it_was_interrupted_in(kind: str, tmp_path: Path) -> None:
    """As in a notebook: with the loaders at hand, whose generators that run has moved, and with torch's own, Python's
    and NumPy's where it left them. So does a script that has drawn something before it resumes."""
    options: dict[str, Any] = {"snapshot_every": 4, "snapshot_dir": tmp_path, "epochs": 3}
    loaders = pair(kind)
    expected = fit(*loaders, **options)
    after = torch.rand(4), random.random(), np.random.random()
    for folder in sorted(tmp_path.glob("step-*"), reverse=True)[::2]:
        random.gauss(0.0, 1.0), np.random.standard_normal()  # half of what is drawn is kept for the next draw
        got = fit(*loaders, resume=folder, **{**options, "snapshot_dir": None, "snapshot_every": 0})
        assert got.weights_sha256 == expected.weights_sha256, folder.name
        assert got.epochs[-1].eval_loss == expected.epochs[-1].eval_loss, folder.name
        now = torch.rand(4), random.random(), np.random.random()
        assert torch.equal(now[0], after[0]), folder.name
        assert now[1:] == after[1:], folder.name


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["no generator", "one generator"])
def test_processes_resume_with_the_loaders_at_hand(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"snapshot_every": 4, "snapshot_dir": tmp_path, "epochs": 3}
    expected = fit(*pair(kind), epochs=3)
    loaders = pair(kind)
    assert fit(*loaders, Processes(stages=2), **options).weights_sha256 == expected.weights_sha256
    first = min(tmp_path.glob("step-*"))
    got = fit(*loaders, Processes(stages=2), resume=first, **{**options, "snapshot_dir": None, "snapshot_every": 0})
    assert got.weights_sha256 == expected.weights_sha256


@pytest.mark.alone
def test_a_later_worker_of_stage_0_reads_what_the_first_would_have(tmp_path: Path) -> None:
    with ranks(2, [loader_worker.__file__, str(tmp_path), "faults"]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    found = json.loads((tmp_path / "0.json").read_text())
    for kind in WITHOUT_WORKERS:
        expected = fit(*pair(kind), epochs=3)
        assert found[kind]["sha256"] == expected.weights_sha256, kind
        assert [stage for stage, _ in found[kind]["recoveries"]] == [0] * len(FAULTS.split(",")), kind


def bad(third: Any) -> list[Any]:
    return [(torch.rand(8, 3, 16, 16), torch.arange(8) % 5), (torch.rand(8, 3, 16, 16), torch.arange(8) % 5), third] * 2


class Broken:
    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        yield torch.rand(8, 3, 16, 16), torch.arange(8) % 5
        raise KeyError("no such file")


class Long(Broken):
    def __init__(self, third: Tensor | None = None) -> None:
        self.third, self.is_long = torch.rand(8, 3, 16, 16) if third is None else third, third is None

    def __iter__(self) -> Iterator[Any]:
        return iter(bad((self.third, torch.arange(8) % 5))[: 6 if self.is_long else 3])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (bad((torch.rand(8, 3, 15, 16), torch.arange(8) % 5)), r"micro-batch 2 of epoch 0 .*\(3, 15, 16\)"),
        (
            bad((torch.rand(8, 3, 16, 16), torch.arange(8))),
            "micro-batch 2 of epoch 0 .*labels from 0 to 7; valid: 0 to 4",
        ),
        (Long(torch.rand(8, 3, 16, 16).long()), "micro-batch 2 of epoch 0 .*torch.int64"),
        (bad((torch.rand(6, 3, 16, 16), torch.arange(6) % 5)), "micro-batch 2 of epoch 0 .*6 samples where 8 are due"),
        (Broken(), "micro-batch 1 of epoch 0 .*the loader failed: KeyError: 'no such file'"),
        (Long(), "micro-batch 2 of epoch 0 .*the loader has length 3, but yields more"),
    ],
    ids=["shape", "labels", "dtype", "rows", "broken", "long"],
)
def test_a_bad_batch_ends_the_run_with_its_place(engine: str, loader: Any, message: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(StageError, match=rf"stage 0 \(rank 0: .*failed in 0F\d.*{message}"):
        fit(loader, engine=engine)
    assert set(threading.enumerate()) <= before


def test_what_does_not_fit_is_said_before_the_run() -> None:
    images, labels = samples(16)
    batches = [(images, labels)]
    with pytest.raises(ValueError, match="the train loader yields 16 rows"):
        fit(batches, batch_size=8)
    with pytest.raises(ValueError, match="give batch_size"):
        fit((images, labels))
    with pytest.raises(ValueError, match="steps_per_epoch is for loaders"):
        fit((images, labels), batch_size=8, steps_per_epoch=1)
    with pytest.raises(ValueError, match="the train data is a int"):
        fit(3)
    with pytest.raises(ValueError, match="the test data has 9 classes, the model tells 5 apart"):
        fit(batches, (images, labels + 4 - labels % 4))
    with pytest.raises(ValueError, match="evaluation samples have shape"):
        fit(batches, [(images[:, :, 1:], labels)])


@pytest.mark.alone
def test_a_loader_that_hangs_is_the_cause_that_all_ranks_are_told(tmp_path: Path) -> None:
    """Not its stage's silence, which the next stage notices while the loader still keeps its own process busy."""
    with ranks(3, [loader_worker.__file__, str(tmp_path), "7"]) as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert all(process.returncode for process in started)
    assert "failed in 0F1 (epoch 0, train micro-batch 1): the data of train micro-batch 1 did not come" in texts[0]
    assert "did not answer" not in texts[0]
