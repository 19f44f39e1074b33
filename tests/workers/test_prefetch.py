"""Reading ahead: the same numbers at any depth, errors where they belong, and no thread left behind."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.data import Augmentation, ImageDataset
from unlocked.kernels.images import load_batch
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item
from unlocked.workers.prefetch import Prefetcher
from unlocked.workers.source import Batch, BatchSource, Source

PLAN = StreamPlan(
    epochs=3, train_size=23, batch_size=8, eval_size=10, eval_batch_size=6, statistics_batches=2, snapshot_every=2
)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def dataset(count: int, split: str, **changes: Any) -> ImageDataset:
    generator = torch.Generator().manual_seed(count)
    augmentation = Augmentation(flip=True, crop_padding=2, erase_probability=0.5) if split == "train" else None
    return ImageDataset(
        name="tiny",
        split=split,
        images=torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 5, (count,), generator=generator),
        num_classes=5,
        augmentation=augmentation or Augmentation(),
        **changes,
    )


def source() -> BatchSource:
    return BatchSource(
        dataset(23, "train"), dataset(10, "test"), seed=4, batch_size=8, eval_batch_size=6, load_batch=load_batch
    )


class Assembles:
    """A source of one function."""

    def __init__(self, function: Callable[[Item, Batch], object]) -> None:
        self.function, self.closed = function, 0

    def load(self, item: Item, out: Batch | None = None) -> Batch:
        assert out is not None
        self.function(item, out)
        return out

    def close(self) -> None:
        self.closed += 1


def prefetcher(source: Source, depth: int = 2, start: int = 0, timeout: float = 60.0) -> Prefetcher:
    return Prefetcher(
        source,
        PLAN.items(start),
        depth=depth,
        rows=PLAN.max_rows,
        sample_shape=(3, 16, 16),
        device=torch.device("cpu"),
        timeout=timeout,
    )


@settings(max_examples=20)
@given(depth=st.integers(1, 40), start=st.integers(0, len(PLAN) - 1), into=st.booleans())
def test_every_item_is_what_the_source_gives(depth: int, start: int, into: bool) -> None:
    """From any position of the stream: augmented, partial, statistics and evaluation micro-batches."""
    plain, ahead = source(), prefetcher(source(), depth, start)
    for item in PLAN.items(start):
        if item.kind == "snapshot":
            continue
        images, labels = plain.load(item)
        out = (torch.empty_like(images), torch.empty_like(labels)) if into else None
        got = ahead.load(item, out)
        assert torch.equal(got[0], images)
        assert torch.equal(got[1], labels)
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert out is None or got[0] is out[0]
    ahead.close()


def test_it_runs_ahead_by_its_depth_and_no_more() -> None:
    """Without a clock: the thread is let go one by one, and stops by itself when the slots are full."""
    begun: list[int] = []
    enough = threading.Semaphore(0)

    def assemble(item: Item, out: Batch) -> None:
        begun.append(item.position)
        out[0].fill_(item.position)
        enough.release()

    items = [item for item in PLAN if item.kind != "snapshot"]
    ahead = prefetcher(Assembles(assemble), depth=3)
    assert begun == [], "nothing happens before the run asks for data"
    held = ahead.load(items[0])[0]
    for _ in range(4):  # the one in use and three more
        assert enough.acquire(timeout=60)
    assert begun == [item.position for item in items[:4]]
    assert held.unique().tolist() == [items[0].position], "the micro-batch in use is not written over"
    ahead.load(items[1])
    assert enough.acquire(timeout=60)
    assert begun == [item.position for item in items[:5]]
    ahead.close()
    assert len(begun) == 5


def test_an_error_is_raised_where_its_micro_batch_was_due() -> None:
    items = [item for item in PLAN if item.kind != "snapshot"]

    def assemble(item: Item, out: Batch) -> None:
        if item.position == items[3].position:
            raise KeyError("broken")

    broken = Assembles(assemble)
    ahead = prefetcher(broken, depth=8)
    for item in items[:3]:
        ahead.load(item)
    for _ in range(2):
        with pytest.raises(KeyError, match="broken"):
            ahead.load(items[3])
    ahead.close()
    ahead.close()
    assert broken.closed


def test_a_reader_that_stands_still_is_an_error() -> None:
    never = threading.Event()
    ahead = prefetcher(Assembles(lambda item, out: never.wait()), timeout=0.05)
    with pytest.raises(ValueError, match=r"train micro-batch 0 did not come within 0.05 s; .* longer timeout"):
        ahead.load(PLAN[0])
    never.set()
    ahead.close()


def test_closing_early_ends_the_thread_at_any_point() -> None:
    for taken in range(4):
        ahead = prefetcher(source(), depth=2)
        for item in [item for item in PLAN if item.kind != "snapshot"][:taken]:
            ahead.load(item)
        ahead.close()


def fit(prefetch: int | None, streamed: bool | None = None, engine: str = "sequential", **options: Any) -> RunResult:
    trainer = Trainer(
        small_conv(3, 5, 16, dropout=0.2),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        engine=engine,
        seed=5,
        prefetch=prefetch,
        statistics_batches=2,
        **{
            name: options.pop(name)
            for name in ("stages", "resume", "snapshot_dir", "snapshot_every", "device")
            if name in options
        },
    )
    train, test = dataset(70, "train", streamed=streamed), dataset(40, "test")
    return trainer.fit(train, eval_data=test, **{"epochs": 2, "batch_size": 16, "eval_batch_size": 25, **options})


@pytest.mark.parametrize("engine", ["sequential", "streams"])
@pytest.mark.parametrize(("prefetch", "streamed"), [(1, None), (3, None), (None, True), (0, True)])
def test_a_run_computes_the_same_numbers(prefetch: int | None, streamed: bool | None, engine: str) -> None:
    expected = fit(0)
    got = fit(prefetch, streamed, engine)
    assert got.weights_sha256 == expected.weights_sha256
    assert [replace(epoch, seconds=0.0) for epoch in got.epochs] == [replace(e, seconds=0.0) for e in expected.epochs]


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    expected = fit(0)
    fit(2, True, snapshot_dir=tmp_path, snapshot_every=3, max_steps=8)
    got = fit(2, True, snapshot_dir=tmp_path, snapshot_every=3, resume=tmp_path)
    assert got.weights_sha256 == expected.weights_sha256


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prefetch is -1; .*at least 0"):
        fit(-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("into", [False, True])
def test_a_gpu_gets_the_same_micro_batches(into: bool) -> None:
    """Copies are in flight while the host assembles the next ones: a slot must not be written over too early."""
    device = torch.device("cuda")
    ahead = Prefetcher(
        source(), PLAN.items(), depth=1, rows=PLAN.max_rows, sample_shape=(3, 16, 16), device=device, timeout=60.0
    )
    plain = source()
    for item in PLAN:
        if item.kind == "snapshot":
            continue
        images, labels = plain.load(item)
        out = (torch.empty_like(images, device=device), torch.empty_like(labels, device=device)) if into else None
        got = ahead.load(item, out)
        assert got[0].is_cuda
        assert torch.equal(got[0].cpu(), images)
        assert torch.equal(got[1].cpu(), labels)
    ahead.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streamed_and_resident_data_train_alike_on_a_gpu() -> None:
    figures = [fit(None, streamed, "streams", device="cuda").epochs[-1].train_loss for streamed in (None, True)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)
