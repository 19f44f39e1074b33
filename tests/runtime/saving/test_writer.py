"""A stage goes on while its snapshot is written, waits for the one before, and hears of what failed."""

import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.models import LinearBlock
from unlocked.rules import CrossEntropy, LayerInfo
from unlocked.runtime.saving.layer_files import LayerFile, read_layer
from unlocked.runtime.saving.writer import SnapshotWriter
from unlocked.workers.errors import StageError
from unlocked.workers.layer import Layer
from unlocked.workers.stage import Stage

LIMIT = 30.0
CPU = torch.device("cpu")


class Gate:
    """Holds a write back at its end."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Semaphore(0), threading.Semaphore(0)
        self.done: list[Mapping[str, LayerFile]] = []

    def __call__(self, files: Mapping[str, LayerFile]) -> None:
        self.reached.release()
        assert self.open.acquire(timeout=LIMIT)
        self.done.append(files)


@pytest.fixture
def stage() -> Stage:
    torch.manual_seed(0)
    layers = []
    for index, name in enumerate(("one", "two")):
        info = LayerInfo(
            name=name,
            index=index,
            activation_shape=(4,),
            num_classes=4,
            latent_size=4,
            hidden=4,
            reduced_rank=2,
            seed=0,
        )
        layers.append(Layer(LinearBlock(4, 4), CrossEntropy(info), info, partial(torch.optim.Adam, lr=0.1), device=CPU))
    return Stage(0, layers)


@pytest.fixture
def writer() -> Iterator[SnapshotWriter]:
    writer = SnapshotWriter("run", rank=2)
    yield writer
    writer.close()


def step(stage: Stage) -> None:
    x, labels = torch.rand(5, 4), torch.arange(5) % 4
    for layer in stage.layers:
        x = layer.forward(x)
        layer.update(labels)


def weights(state: Mapping[str, Any]) -> torch.Tensor:
    return next(iter(state["block"].values())).clone()


def test_what_is_written_is_the_state_at_the_mark(stage: Stage, writer: SnapshotWriter, tmp_path: Path) -> None:
    gate = Gate()
    step(stage)
    then = [weights(layer.state_dict()) for layer in stage.layers]
    writer.save(stage, tmp_path / "a", 1, gate)
    step(stage)  # while the thread writes
    gate.open.release()
    writer.finish()
    for path, expected, layer in zip(sorted((tmp_path / "a").iterdir()), then, stage.layers, strict=True):
        state = read_layer(path, CPU, written=gate.done[0][layer.name], run="run", position=1, layer=layer.name)
        assert torch.equal(weights(state), expected)
        assert not torch.equal(weights(layer.state_dict()), expected)
        assert state["optimizer"]["state"][0]["step"] == 1


def test_memory_is_one_copy_and_the_next_snapshot_waits(stage: Stage, writer: SnapshotWriter, tmp_path: Path) -> None:
    gate = Gate()
    step(stage)
    writer.save(stage, tmp_path / "a", 1, gate)
    assert gate.reached.acquire(timeout=LIMIT)
    second = threading.Thread(target=writer.save, args=(stage, tmp_path / "b", 2, gate))
    second.start()
    assert not gate.reached.acquire(timeout=0.2), "the second began before the first was done"
    assert second.is_alive()
    gate.open.release(2)
    second.join(LIMIT)
    copies = [one.data_ptr() for one in _tensors(writer._copies)]
    writer.finish()
    writer.save(stage, tmp_path / "c", 3, lambda files: None)
    writer.finish()
    assert [one.data_ptr() for one in _tensors(writer._copies)] == copies


def test_a_disk_that_does_not_answer_is_not_waited_for_for_ever(stage: Stage, tmp_path: Path) -> None:
    """Nor is it when the process ends, as the thread of an executor would be."""
    before, writer = set(threading.enumerate()), SnapshotWriter("run", rank=2, timeout=0.1)
    answers = threading.Event()
    writer.save(stage, tmp_path / "a", 18, lambda files: assert_(answers.wait(LIMIT)))
    begun = time.monotonic()
    words = r"stage 0 \(rank 2: one, two\) failed in 0SNAP17 .*the disk has taken no layer's file for 0\.4 s"
    with pytest.raises(StageError, match=words):
        writer.save(stage, tmp_path / "b", 20, lambda files: None)
    assert 0.4 <= time.monotonic() - begun < LIMIT / 2
    writer.close()
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon
    answers.set()
    thread.join(LIMIT)
    assert not (tmp_path / "b").exists()


def assert_(true: bool) -> None:
    assert true


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def test_what_fails_is_the_marks_failure_and_leaves_nothing(
    stage: Stage, writer: SnapshotWriter, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    writer.save(stage, tmp_path / "file" / "a", 18, lambda files: None)
    with pytest.raises(StageError, match=r"stage 0 \(rank 2: one, two\) failed in 0SNAP17 .*Not a directory"):
        writer.finish()
    writer.finish()  # it is told once
    writer.save(stage, tmp_path / "b", 20, lambda files: None)
    writer.finish()
    assert len(list((tmp_path / "b").iterdir())) == 2


@pytest.mark.parametrize("what", ["weight", "buffer"])
def test_what_is_not_finite_is_not_saved(what: str, stage: Stage, writer: SnapshotWriter, tmp_path: Path) -> None:
    gate = Gate()
    gate.open.release()
    layer = stage.layers[1]
    layer.block.register_buffer("mean", torch.zeros(2))
    spoilt = layer.parameters[-1] if what == "weight" else layer.block.get_buffer("mean")
    with torch.no_grad():
        spoilt.fill_(torch.nan)
    writer.save(stage, tmp_path / "a", 1, gate)
    with pytest.raises(StageError, match=r"0SNAP0 .*layer two holds values that are not finite in block\."):
        writer.finish()
    assert not (tmp_path / "a").exists()
    assert not gate.done


def test_check_tells_of_a_failure_as_soon_as_it_is_known(stage: Stage, writer: SnapshotWriter, tmp_path: Path) -> None:
    gate = Gate()

    def fail(files: Mapping[str, LayerFile]) -> None:
        gate(files)
        raise OSError("gone")

    writer.save(stage, tmp_path / "a", 1, fail)
    writer.check()
    gate.open.release()
    writer.close()
    with pytest.raises(StageError, match="gone"):
        writer.check()
