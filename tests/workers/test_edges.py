"""Slots, rings and edges: what goes in comes out, in order, whole or partial, between real processes."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.links import link_stages
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError
from unlocked.workers.ring import Ring

CPU = torch.device("cpu")
SHAPE = (3, 4, 5)
SIZES = [6, 6, 1, 6, 4, 6, 6, 2]


@settings(max_examples=40)
@given(
    rows=st.integers(1, 20),
    extra=st.integers(0, 5),
    shape=st.sampled_from([(7,), (3, 4), (5, 2, 3), (1, 1, 1)]),
)
def test_a_slot_holds_labels_and_activations_without_overlap(rows: int, extra: int, shape: tuple[int, ...]) -> None:
    layout = SlotLayout(rows + extra, shape)
    slot = layout.allocate(CPU)
    slot.fill_(255)
    values, labels = layout.views(slot, rows)
    assert values.shape == (rows, *shape)
    assert values.data_ptr() % 64 == slot.data_ptr() % 64
    expected = torch.randn(rows, *shape)
    values.copy_(expected)
    labels.copy_(torch.arange(rows))
    again, numbers = layout.views(slot, rows)
    assert torch.equal(again, expected)
    assert torch.equal(numbers, torch.arange(rows))
    assert (slot[layout.nbytes(rows) :] == 255).all(), "a partial batch is a prefix"
    if len(shape) == 3:
        assert values.is_contiguous(memory_format=torch.channels_last)


def test_a_ring_uses_its_slots_in_turn() -> None:
    ring = Ring(3, 4, SHAPE, CPU, flat_consumer=False)
    flat = Ring(3, 4, SHAPE, CPU, flat_consumer=True)
    pointers = [ring.views(item(i, 4))[0].data_ptr() for i in range(6)]
    assert pointers[:3] == pointers[3:]
    assert len(set(pointers)) == 3
    assert ring.views(item(0, 2))[0].is_contiguous(memory_format=torch.channels_last)
    assert flat.views(item(0, 2))[0].is_contiguous()


def item(position: int, size: int) -> Item:
    return Item(position, "train", 0, position, size, False)


def content(position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(position)
    return torch.randn(size, *SHAPE, generator=generator), torch.full((size,), position)


def worker(rank: int, folder: str, transport: str, depth: int, crash: bool) -> None:
    torch.set_num_threads(1)
    layout = SlotLayout(max(SIZES), SHAPE)
    inbox, outbox = link_stages(
        dist.FileStore(f"{folder}/store", 2),
        World(rank, 2, rank, 2, "127.0.0.1", 0),
        layout if rank else None,
        None if rank else layout,
        transport=transport,
        depth=depth,
        device=CPU,
        timeout=20,
        names=["stage 0", "stage 1"],
    )
    items = [item(i, size) for i, size in enumerate(SIZES)]
    if outbox is not None:
        for i in items:
            if crash and i.position == 5:
                os._exit(9)
            for place, part in zip(outbox.reserve(i), content(i.position, i.size), strict=True):
                place.copy_(part)
            outbox.send(i)
        outbox.flush()
        return
    assert inbox is not None
    inbox.expect(items)
    try:
        for i in items:
            values, labels = inbox.receive(i)
            expected = content(i.position, i.size)
            assert torch.equal(values, expected[0])
            assert torch.equal(labels, expected[1])
            inbox.release()
        verdict = "all"
    except LinkLostError as error:
        verdict = str(error)
    Path(folder, "verdict").write_text(verdict)


@pytest.mark.alone
@pytest.mark.parametrize("transport", ["shared", "group"])
@pytest.mark.parametrize("depth", [1, 3])
def test_an_edge_between_processes_keeps_order_and_content(transport: str, depth: int, tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path), transport, depth, False), nprocs=2)
    assert (tmp_path / "verdict").read_text() == "all"


@pytest.mark.alone
@pytest.mark.parametrize("transport", ["shared", "group"])
def test_a_dead_neighbour_is_a_lost_link(transport: str, tmp_path: Path) -> None:
    context = mp.spawn(worker, args=(str(tmp_path), transport, 2, True), nprocs=2, join=False)
    for process in context.processes:
        process.join(30)
    assert context.processes[0].exitcode == 9
    assert context.processes[1].exitcode == 0
    assert "stage 0" in (tmp_path / "verdict").read_text()


def test_an_unknown_transport_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="auto, shared, group"):
        link_stages(
            dist.HashStore(),
            World(0, 1, 0, 1, "127.0.0.1", 0),
            None,
            None,
            transport="pigeon",
            depth=1,
            device=CPU,
            timeout=1,
            names=["stage 0"],
        )
