"""How neighbouring stages reach each other: shared memory on one machine, a torch.distributed group otherwise."""

import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from unlocked.runtime.engines.processes.rendezvous import World
from unlocked.workers.edges import InEdge, OutEdge, SlotLayout, make_edges
from unlocked.workers.shared_edges import SharedListener, SharedOutEdge

__all__ = ["TRANSPORTS", "link_stages"]

TRANSPORTS = ("auto", "shared", "group")
_PATIENCE = 4  # times the edges' own time limit


def link_stages(
    store: dist.Store,
    world: World,
    incoming: SlotLayout | None,
    outgoing: SlotLayout | None,
    *,
    transport: str,
    depth: int,
    device: torch.device,
    timeout: float,
    names: Sequence[str],
) -> tuple[InEdge | None, OutEdge | None]:
    """This rank's edges. Every rank takes the same decision.

    Args:
        incoming, outgoing: what travels from rank - 1 and to rank + 1; None at the ends of the pipeline.
        transport: "shared" (one machine, CPU), "group" (Gloo or NCCL), or "auto": shared where it is possible.
        names: of the stages, for messages.

    Raises:
        ValueError: shared memory was asked for where it is not possible.
        LinkLostError: a neighbour did not come.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport {transport!r} is not known; valid: {', '.join(TRANSPORTS)}")
    one_machine = device.type == "cpu" and _on_one_machine(store, world, timeout)
    if transport == "shared" and not one_machine:
        raise ValueError("transport 'shared' needs all processes on the CPUs of one machine; use 'group' or 'auto'")
    if one_machine and transport != "group":
        return _share_memory(store, world, incoming, outgoing, depth, timeout, names)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        # NCCL ends the process without a word when its own time is up: the edges, which name the neighbour, come first.
        timeout=timedelta(seconds=timeout * (_PATIENCE if on_gpu else 1)),
    )
    return make_edges(incoming, outgoing, rank=world.rank, depth=depth, device=device, timeout=timeout)


def _share_memory(
    store: dist.Store,
    world: World,
    incoming: SlotLayout | None,
    outgoing: SlotLayout | None,
    depth: int,
    timeout: float,
    names: Sequence[str],
) -> tuple[InEdge | None, OutEdge | None]:
    inbox: InEdge | None = None
    outbox: OutEdge | None = None
    listener = None
    if incoming is not None:
        listener = SharedListener(incoming, depth=depth, timeout=timeout)
        store.set(f"edge-{world.rank}", listener.address)
    try:
        if outgoing is not None:
            key = f"edge-{world.rank + 1}"
            store.wait([key], timedelta(seconds=timeout))
            address = store.get(key).decode()
            outbox = SharedOutEdge(outgoing, address, depth=depth, timeout=timeout, neighbour=names[world.rank + 1])
        if listener is not None:
            inbox = listener.accept(names[world.rank - 1])
    finally:
        if listener is not None:
            listener.close()
    return inbox, outbox


def _on_one_machine(store: dist.Store, world: World, timeout: float) -> bool:
    """Whether all ranks see the same host and the same running kernel (containers may share a name)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    mine = socket.gethostname() + (boot.read_text().strip() if boot.exists() else "")
    store.set(f"host-{world.rank}", mine)
    keys = [f"host-{rank}" for rank in range(world.size)]
    store.wait(keys, timedelta(seconds=timeout))
    return all(store.get(key).decode() == mine for key in keys)
