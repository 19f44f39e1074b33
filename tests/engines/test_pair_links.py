"""A link through a process group of two, formed anew: by what the coordinator says, never by what has broken; and the
half message of a process that died holds nobody up."""

import contextlib
import mmap
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from coordination import LAYERS, TIMEOUT, make_client, until

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.messages import EdgeBroken
from unlocked.runtime.engines.processes.pairs import PairInEdge, PairLink, PairOutEdge
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError
from unlocked.workers.slot_log import SlotLog

pytestmark = pytest.mark.alone

LAYOUT = SlotLayout(32, (1_000_000,))  # 128 MB: more than the system holds of it, and some tens of milliseconds
ITEMS = [Item(position, "train", 0, position, 32, position == 1) for position in range(2)]

# One end of the link's first generation. The receiving one dies when the message has begun to come.
OTHER = """
import os, signal, sys
from datetime import timedelta
import torch, torch.distributed as dist
side, size = int(sys.argv[1]), int(sys.argv[2])
store = dist.PrefixStore("edge-1/generation-0", dist.FileStore(sys.argv[3], -1))
store.set(f"here-{side}", "")
store.wait([f"here-{1 - side}"])
group = dist.ProcessGroupGloo(store, side, 2, timeout=timedelta(seconds=30))
place, message = torch.zeros(1, dtype=torch.int64), torch.full((size,), 1 - side, dtype=torch.uint8)
if side == 0:
    group.recv([place], 1, 1).wait()
    group.send([message], 1, 0).wait()
else:
    group.send([place], 0, 1).wait()
    work = group.recv([message], 0, 0)
    while not message[1000]:  # behind the labels
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@dataclass(frozen=True, slots=True)
class Ends:
    store: dist.Store
    clients: list[CoordinatorClient]
    links: list[PairLink]

    def form_anew(self) -> None:
        """As after a death: both ends are told of the next generation."""
        self.clients[0].tell(EdgeBroken(edge=1, generation=0))
        until(lambda: all(client.generations.get(1) == 1 for client in self.clients))


@contextlib.contextmanager
def both_ends(folder: Path, *timeouts: float) -> Iterator[Ends]:
    """`timeouts`: of the sending and of the receiving end."""
    store = dist.FileStore(str(folder / "store"), -1)
    with Coordinator(LAYERS[:2], 50) as coordinator, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(make_client(coordinator.address, stage)) for stage in range(2)]
        for client in clients:
            client.wait_started()
        links = [
            PairLink(store, client, edge=1, side=side, timeout=timeouts[side], neighbour=f"stage {1 - side}")
            for side, client in enumerate(clients)
        ]
        yield Ends(store, clients, links)


@contextlib.contextmanager
def other(folder: Path, side: int) -> "Iterator[subprocess.Popen[bytes]]":
    size = str(LAYOUT.nbytes(32))
    with subprocess.Popen([sys.executable, "-c", OTHER, str(side), size, str(folder / "store")]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_what_has_broken_is_not_tried_again(tmp_path: Path) -> None:
    """The dead process's address is still in the store; to connect to it would take five seconds."""
    with both_ends(tmp_path, TIMEOUT, TIMEOUT) as ends, ThreadPoolExecutor(2) as threads:
        list(threads.map(PairLink.form, ends.links))
        ends.links[0].timeout = timedelta(seconds=0.5)
        here = "edge-1/generation-0/here-0"
        assert ends.store.delete_key(here)
        with pytest.raises(LinkLostError, match="the link to stage 1 could not be formed"):
            ends.links[0].form()
        assert not ends.store.check([here])


def test_the_next_generation_is_formed_by_both(tmp_path: Path) -> None:
    with both_ends(tmp_path, TIMEOUT, TIMEOUT) as ends, ThreadPoolExecutor(2) as threads:
        list(threads.map(PairLink.form, ends.links))
        ends.form_anew()
        assert all(link.is_stale for link in ends.links)
        list(threads.map(PairLink.form, ends.links))
        assert not any(link.is_stale for link in ends.links)


def test_a_receiver_is_not_held_up_by_the_half_message_of_a_dead_sender(tmp_path: Path) -> None:
    with (
        both_ends(tmp_path, TIMEOUT, 60) as ends,
        ThreadPoolExecutor(1) as threads,
        other(tmp_path, side=0) as sender,
    ):
        inbox = PairInEdge(LAYOUT, ends.links[1], ends.clients[1], depth=1, slots=8)
        first = inbox._free[0]
        first.zero_()
        inbox.expect(ITEMS)
        received = threads.submit(inbox.receive, ITEMS[0])
        while not first[0] and sender.poll() is None:
            pass  # whoever sleeps may miss all of it
        sender.kill()
        sender.wait()
        assert not first[-1], "the message is whole"
        ends.form_anew()
        group = ends.links[0].form()
        place = torch.zeros(1, dtype=torch.int64)
        group.recv([place], 1, 1).wait()
        group.send([torch.full((LAYOUT.nbytes(32),), 7, dtype=torch.uint8)], 1, 0).wait()
        values, _ = received.result(TIMEOUT)
        assert int(place) == 0
        assert bool((values.view(torch.uint8) == 7).all())


def test_a_sender_is_not_held_up_by_the_half_message_of_a_dead_receiver(tmp_path: Path) -> None:
    log = SlotLog(mmap.mmap(-1, SlotLog.nbytes(LAYOUT, 2)), LAYOUT, 2)
    with both_ends(tmp_path, 60, TIMEOUT) as ends, other(tmp_path, side=1) as receiver:
        outbox = PairOutEdge(log, ends.links[0], ends.clients[0])
        outbox.start()
        values, _ = outbox.reserve(ITEMS[0])
        values.view(torch.uint8).fill_(7)
        outbox.send(ITEMS[0])
        assert receiver.wait(60) == -signal.SIGKILL
        ends.form_anew()
        group = ends.links[1].form()
        message = torch.zeros(LAYOUT.nbytes(32), dtype=torch.uint8)
        group.send([torch.zeros(1, dtype=torch.int64)], 0, 1).wait()
        group.recv([message], 0, 0).wait()
        assert bool((LAYOUT.views(message, 32)[0].view(torch.uint8) == 7).all())
        ends.links[0].closing = True
        ends.clients[0].wake()


def test_a_sender_whose_stage_stands_still_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """Its threads live: they form every link anew, and heartbeats go on."""
    layout, items = SlotLayout(4, (3,)), [Item(position, "train", 0, position, 4, False) for position in range(2)]
    log, goes_on = SlotLog(mmap.mmap(-1, SlotLog.nbytes(layout, 4)), layout, 4), threading.Event()
    with both_ends(tmp_path, 0.5, 0.5) as ends, ThreadPoolExecutor(2) as threads:
        outbox = PairOutEdge(log, ends.links[0], ends.clients[0])
        inbox = PairInEdge(layout, ends.links[1], ends.clients[1], depth=2, slots=4)
        inbox.expect(items)

        def stage() -> None:
            for item in items:
                outbox.reserve(item)[0].fill_(item.position)
                outbox.send(item)
                assert goes_on.wait(60)

        outbox.start()
        stands = threads.submit(stage)
        assert inbox.receive(items[0])[0].sum() == 0
        inbox.release()
        begun = time.monotonic()
        received = threads.submit(inbox.receive, items[1])
        try:
            with pytest.raises(LinkLostError, match="stage 0 handed nothing on within 1 s"):
                received.result(30)
            assert 1.0 <= time.monotonic() - begun < 10
            assert not stands.done()
            assert ends.clients[1].generations[1] >= 1, "the link was formed anew before"
        finally:
            goes_on.set()
            ends.links[0].closing = ends.links[1].closing = True
            ends.clients[0].wake()


def test_a_senders_successor_has_that_time_from_its_own_beginning(tmp_path: Path) -> None:
    layout, item = SlotLayout(4, (3,)), Item(0, "train", 0, 0, 4, True)
    with both_ends(tmp_path, TIMEOUT, 2.0) as ends, ThreadPoolExecutor(1) as threads:
        inbox = PairInEdge(layout, ends.links[1], ends.clients[1], depth=1, slots=4)
        inbox.expect([item])
        received = threads.submit(inbox.receive, item)
        links = [ends.links[0]]
        for _ in range(3):  # of which each is silent for half of the receiver's time
            group = links[-1].form()
            group.recv([torch.zeros(1, dtype=torch.int64)], 1, 1).wait()
            until(lambda: ends.links[1].is_stale or received.done())
            old, client = links[-1], ends.clients[0]
            links.append(PairLink(ends.store, client, edge=1, side=0, timeout=TIMEOUT, neighbour="stage 1"))
            links[-1]._generation = old._generation
        assert not received.done()
        group = links[-1].form()
        group.recv([torch.zeros(1, dtype=torch.int64)], 1, 1).wait()
        group.send([torch.full((layout.nbytes(4),), 7, dtype=torch.uint8)], 1, 0).wait()
        values, _ = received.result(TIMEOUT)
        assert bool((values.view(torch.uint8) == 7).all())
