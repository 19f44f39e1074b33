"""The loop that executes a stage's actions: order, the seams between items, slots given back, errors with a place."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.rules import LLS, CrossEntropy
from unlocked.runtime.network import build_layer, build_network
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import NonFiniteLossError, StageError, StopRun
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

CPU = torch.device("cpu")
PLAN = StreamPlan(
    epochs=2, train_size=10, batch_size=4, eval_size=5, eval_batch_size=3, statistics_batches=1, snapshot_every=2
)


class Pipe:
    """Both ends of an edge in one process: unbounded, and it remembers which slots are out."""

    def __init__(self) -> None:
        self.layout = SlotLayout(4, (6,))
        self.queue: list[tuple[Item, Tensor, Tensor]] = []
        self.expected: list[Item] = []
        self.lent = 0

    def expect(self, items: Any) -> None:
        self.expected += items

    def receive(self, item: Item) -> tuple[Tensor, Tensor]:
        sent, values, labels = self.queue.pop(0)
        assert sent == item == self.expected.pop(0)
        assert self.lent == 0, "the slot before is still out"
        self.lent += 1
        return values, labels

    def release(self) -> None:
        self.lent -= 1

    def reserve(self, item: Item) -> tuple[Tensor, Tensor]:
        self.reserved = self.layout.views(self.layout.allocate(CPU), item.size)
        return self.reserved

    def send(self, item: Item) -> None:
        self.queue.append((item, *self.reserved))

    def flush(self) -> None: ...


class Source:
    """Data by the item alone."""

    def load(self, item: Item) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(item.position)
        return torch.randn(item.size, 8, generator=generator), torch.arange(item.size) % 3


def _stages() -> list[Stage]:
    torch.manual_seed(0)  # the same start values every time
    model = [nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU()), nn.Linear(6, 3)]
    network = build_network(model, input_shape=(8,), num_classes=3, seed=0)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    layers = [build_layer(network, i, rule=LLS(), optimizer=optimizer, device=CPU, step=None) for i in range(2)]
    assert isinstance(layers[1].rule, CrossEntropy)
    return [Stage(0, layers[:1], Source()), Stage(1, layers[1:])]  # type: ignore[arg-type]


def _loop(stage: Stage, inbox: Any, outbox: Any, **calls: Any) -> StageLoop:
    hooks: dict[str, Any] = {
        "snapshot": lambda item: None,
        "before_item": lambda item: None,
        "after_item": lambda item: None,
        "stopwatch": Stopwatch(keep=True),
        **calls,
    }
    return StageLoop(stage, rank=7, inbox=inbox, outbox=outbox, **hooks)


def test_two_loops_do_what_the_stages_would_alone() -> None:
    items, pipe, log = list(PLAN), Pipe(), []
    first, second = _stages()
    snapshots: list[tuple[int, Item]] = []
    for k, stage in enumerate((first, second)):
        loop = _loop(
            stage,
            pipe if k else None,
            None if k else pipe,
            snapshot=lambda item, k=k: snapshots.append((k, item)),
            before_item=lambda item: log.append(("before", item)),
            after_item=lambda item, stage=stage: (log.append(("after", item)), stage.count(item)),
        )
        loop.run(items, stage_actions(k, 2, items))
        assert [one.label for one in loop.stopwatch.timed] == [str(a) for a in stage_actions(k, 2, items)]
    assert log == 2 * [(what, item) for item in items for what in ("before", "after")]
    marks = [item for item in items if item.kind == "snapshot"]
    assert marks
    assert snapshots == [(k, item) for k in range(2) for item in marks]
    assert (pipe.queue, pipe.expected, pipe.lent) == ([], [], 0)
    assert second.images_this_epoch == 20
    assert second.images_evaluated == 10

    alone, last = _stages()
    for item in items:
        if item.kind == "snapshot":
            continue
        x, labels = Source().load(item)
        if item.kind == "evaluate":
            last.evaluate(item, alone.evaluate(item, x, labels), labels)
            continue
        last.forward(item, alone.forward(item, x, labels), labels)
        if item.kind == "train":
            alone.update(item)
            last.update(item)
    for a, b in zip((first, second), (alone, last), strict=True):
        for (name, value), (_, expected) in zip(a.layers[0].tensors(), b.layers[0].tensors(), strict=True):
            assert torch.equal(value, expected), name
        assert torch.equal(torch.stack(a.sums()), torch.stack(b.sums()))


def test_an_error_names_rank_stage_layers_and_action() -> None:
    stage, _ = _stages()
    stage.layers[0].optimizer.param_groups[0]["lr"] = float("nan")
    items = list(PLAN)
    with pytest.raises(StageError, match="stage 0") as caught:
        _loop(stage, None, Pipe()).run(items, stage_actions(0, 2, items))
    text = str(caught.value)
    assert "stage 0 (rank 7: sequential1) failed in 0U1 (epoch 0, train micro-batch 1)" in text
    assert "the loss of layer sequential1 is nan" in text
    assert isinstance(caught.value.cause, NonFiniteLossError)


def test_an_orderly_stop_passes_through() -> None:
    stage, _ = _stages()

    def stop(item: Item) -> None:
        if item.index == 1:
            raise StopRun

    items = list(PLAN)
    pipe = Pipe()
    with pytest.raises(StopRun):
        _loop(stage, None, pipe, after_item=stop).run(items, stage_actions(0, 2, items))
    assert [item.position for item, _, _ in pipe.queue] == [0, 1]
