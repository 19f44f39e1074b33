"""An edge that keeps what was sent: whoever comes back at either end finds it, and nothing is lost or comes twice."""

import mmap
import os
import random
import resource
import sys
import time

import pytest
import torch

from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError
from unlocked.workers.shared_edges import SharedInEdge, SharedListener, SharedOutEdge
from unlocked.workers.slot_log import SlotLog

LAYOUT = SlotLayout(4, (3,))
DEPTH, SLOTS = 2, 6


def edge(timeout: float = 5.0) -> tuple[SharedOutEdge, SharedInEdge]:
    listener = SharedListener(LAYOUT, depth=DEPTH, timeout=timeout, log_slots=SLOTS)
    address, slots = listener.address, listener.slots
    outbox = SharedOutEdge(LAYOUT, address, depth=DEPTH, timeout=timeout, neighbour="the next", slots=slots)
    inbox = listener.accept("the one before")
    inbox.keeps_log = True
    return outbox, inbox


def item(number: int) -> Item:
    return Item(number, "train", 0, number, 1 + number % 4, False)


def send(outbox: SharedOutEdge, number: int) -> None:
    values, labels = outbox.reserve(item(number))
    values.fill_(number)
    labels.fill_(number)
    outbox.send(item(number))


def receive(inbox: SharedInEdge, number: int) -> None:
    """Asserts that it is the right one."""
    inbox.expect([item(number)])
    values, labels = inbox.receive(item(number))
    assert torch.equal(values, torch.full((item(number).size, 3), float(number)))
    assert torch.equal(labels, torch.full((item(number).size,), number))
    inbox.release()


def test_a_receiver_reads_again_from_its_snapshot() -> None:
    outbox, inbox = edge()
    for number in range(4):
        send(outbox, number)
        receive(inbox, number)
        if number == 1:
            inbox.keep()
    inbox.go_back(2)
    for number in (2, 3):
        receive(inbox, number)
    send(outbox, 4)
    receive(inbox, 4)


def test_a_sender_does_not_touch_what_was_sent() -> None:
    outbox, inbox = edge()
    for number in range(2):
        send(outbox, number)
    outbox.go_back(0)
    values, _ = outbox.reserve(item(0))
    values.fill_(99.0)  # nobody reads this
    outbox.send(item(0))
    receive(inbox, 0)
    send(outbox, 1)
    receive(inbox, 1)
    send(outbox, 2)
    receive(inbox, 2)
    assert outbox.count == inbox.count == 3


def test_a_full_log_waits_for_the_receivers_snapshot() -> None:
    outbox, inbox = edge(timeout=0.2)
    for number in range(SLOTS):
        send(outbox, number)
        receive(inbox, number)
    assert inbox.unkept >= 1
    with pytest.raises(LinkLostError, match="the next did not answer"):
        outbox.reserve(item(SLOTS))
    inbox.keep()
    send(outbox, SLOTS)
    receive(inbox, SLOTS)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_at_either_end_every_micro_batch_is_read_as_it_was_sent(seed: int) -> None:
    chance = random.Random(seed)
    outbox, inbox = edge()
    sent = done = saved_out = 0  # as an edge that nothing ever happens to would count
    while done < 60:
        deed = chance.choice(["send", "receive", "save sender", "save receiver", "sender dies", "receiver dies"])
        if deed == "send" and (outbox.count < sent or (sent - done < DEPTH and sent - inbox.log.kept < SLOTS)):
            send(outbox, outbox.count)
            sent = max(sent, outbox.count)
        elif deed == "receive" and inbox.count < sent:
            receive(inbox, inbox.count)
            done = max(done, inbox.count)
        elif deed == "save sender":
            saved_out = outbox.count
        elif deed == "save receiver":
            inbox.keep()
        elif deed == "sender dies":
            outbox.go_back(saved_out)
        elif deed == "receiver dies":
            inbox.go_back(inbox.log.kept)


def test_a_sender_that_died_before_it_woke_the_receiver_is_made_up_for() -> None:
    """The next incarnation does its work again, and has nothing new to send: it wakes the receiver all the same."""
    outbox, inbox = edge()
    outbox.reserve(item(0))
    outbox.log.sent = 1  # and dies here
    outbox.go_back(0)
    send(outbox, 0)
    assert inbox._link._arrival.poll(0), "nobody tells a receiver that waits already"


def test_a_neighbour_that_does_a_dead_ones_work_again_is_waited_for() -> None:
    """As long as it shows that it works: its replay may take longer than the time limit."""
    outbox, inbox = edge(timeout=0.4)
    for number in range(DEPTH):
        send(outbox, number)
    looks = []

    def is_done() -> bool:
        looks.append(time.monotonic())
        inbox._link.wake()  # of the neighbour that comes to the next item of its replay
        time.sleep(0.1)
        return len(looks) > 10

    outbox._link.wait_until(is_done)
    assert looks[-1] - looks[0] > 0.8
    with pytest.raises(LinkLostError, match="did not answer"):
        outbox._link.wait_until(lambda: False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps memory ahead of its use")
def test_a_ring_that_is_mapped_in_costs_no_page_faults_in_the_stream() -> None:
    layout, slots = SlotLayout(64, (256,)), 64
    file = os.memfd_create("ring")
    os.posix_fallocate(file, 0, SlotLog.nbytes(layout, slots))

    def faults(*, ahead: bool) -> int:
        log = SlotLog(mmap.mmap(file, SlotLog.nbytes(layout, slots)), layout, slots)
        if ahead:
            log.map_in()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for number in range(slots):
            log.slot(number).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    pages = slots * SlotLog.slot_bytes(layout) // mmap.PAGESIZE
    lazily = faults(ahead=False)
    try:
        mmap.mmap(file, mmap.PAGESIZE).madvise(22)
    except OSError:
        pytest.skip("this Linux is older than 5.14")
    assert lazily > pages // 32  # a system may map several at once
    assert faults(ahead=True) < lazily / 4
    os.close(file)


def test_a_neighbour_that_was_there_in_time_is_not_blamed() -> None:
    """This process may have stood still until the time was over; what came meanwhile lies in the socket."""
    outbox, inbox = edge(timeout=0.0)
    inbox._link.wake()
    looks = iter((False, False, True))
    outbox._link.wait_until(lambda: next(looks))
