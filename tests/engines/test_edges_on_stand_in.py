"""Edges between processes on a GPU, as far as that shows without one: the host does not wait for a message, runs ahead
within bounds, and names the neighbour that does not answer."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from cuda_stand_in.device import Device, Event
from cuda_stand_in.install import cuda_stand_in
from torch.testing._internal.distributed.fake_pg import FakeStore

from unlocked.runtime.engines.processes.engine import _device
from unlocked.runtime.engines.processes.rendezvous import World
from unlocked.workers import lead
from unlocked.workers.actions import Item
from unlocked.workers.edges import InEdge, OutEdge, SlotLayout, make_edges
from unlocked.workers.errors import LinkLostError

CUDA = torch.device("cuda", 1)
LAYOUT = SlotLayout(4, (3,))


@pytest.fixture
def device() -> Iterator[Device]:
    """Rank 1 of three, whose messages arrive at once and hold anything."""
    with cuda_stand_in() as device:
        dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
        yield device
        dist.destroy_process_group()


def edges(timeout: float = 20.0) -> tuple[InEdge, OutEdge]:
    inbox, outbox = make_edges(LAYOUT, LAYOUT, rank=1, depth=2, device=CUDA, timeout=timeout)
    assert inbox is not None
    assert outbox is not None
    return inbox, outbox


def pass_on(inbox: InEdge, outbox: OutEdge, count: int) -> None:
    items = [Item(i, "train", 0, i, 4, False) for i in range(count)]
    inbox.expect(items)
    for item in items:
        values, labels = inbox.receive(item)
        out, out_labels = outbox.reserve(item)
        out.copy_(values)
        out_labels.copy_(labels)
        inbox.release()
        outbox.send(item)


def host_waits(device: Device) -> int:
    return sum(device.host_waits.values()) + sum(n for wait, n in device.waits.items() if wait.startswith("query"))


def test_the_host_waits_for_no_message_and_runs_ahead_within_bounds(device: Device) -> None:
    inbox, outbox = edges()
    before = host_waits(device)
    bound = lead._STRIDE * (lead._EVENTS + 1)
    pass_on(inbox, outbox, bound - 1)
    assert host_waits(device) == before
    pass_on(inbox, outbox, 1)
    assert host_waits(device) > before


def test_work_is_waited_for_by_the_stream_and_not_by_the_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit makes NCCL's `wait` one of the host."""
    limits: list[tuple[object, ...]] = []
    original = dist.irecv

    class Recorded:
        def __init__(self, work: dist.Work) -> None:
            self._work = work

        def wait(self, *limit: object) -> None:
            limits.append(limit)
            self._work.wait(*limit)

    monkeypatch.setattr(dist, "irecv", lambda *given, **named: Recorded(original(*given, **named)))
    pass_on(*edges(), 3)
    assert limits == [()] * 4


def test_a_neighbour_that_does_not_answer_is_named(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, outbox = edges(timeout=0.05)
    monkeypatch.setattr(Event, "query", lambda self: False)
    with pytest.raises(LinkLostError, match=r"nothing has moved on the link to stage 0 for 0\.05 s"):
        pass_on(inbox, outbox, 1000)
    with pytest.raises(LinkLostError, match="link to stage 2"):
        outbox.flush()


@pytest.mark.parametrize(("asked", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_process_works_on_the_device_that_it_was_given(asked: str, index: int) -> None:
    """Not only its tensors: its events and messages, too."""

    class Job:
        device = torch.device(asked)

    with cuda_stand_in():
        assert _device(Job(), World(0, 1, 0, 1, "127.0.0.1", 0)) == torch.device("cuda", index)  # type: ignore[arg-type]
        assert torch.cuda.current_device() == index
