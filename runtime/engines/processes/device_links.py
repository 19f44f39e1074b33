"""Ranks that share a GPU: who does, which transports can serve them, and their edges."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from unlocked.models.errors import first_line
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import await_keys, gather
from unlocked.workers.device_edges import DeviceInEdge, DeviceOutEdge
from unlocked.workers.edges import InEdge, OutEdge, SlotLayout

__all__ = ["link_on_device", "may_share", "pick_device"]


def pick_device(local_rank: int) -> torch.device:
    """The GPU of a process that was given none: one of its own, or the machine's only one, shared with the others.

    Raises:
        ValueError: there are several, but not one for each process.
    """
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ValueError(
            f"process {local_rank} of this machine has no GPU of its own ({count} found); start one process per GPU, "
            "or put all of them on one: --device cuda:0"
        )
    if not count:
        raise ValueError("no CUDA device is visible here; use --device cpu")
    return torch.device("cuda", local_rank if count > 1 else 0)


def may_share(
    store: dist.Store, world: World, device: torch.device, transport: str, timeout: float
) -> tuple[bool, str | None]:
    """Whether the edges lie in the memory of a GPU that their ranks share; and why the transport can't serve these
    ranks, or None. Every rank hears the same.

    NCCL takes one rank per GPU; an edge in a GPU's memory needs both of its ranks there.
    """
    devices = gather(store, world, "device", str(torch.cuda.get_device_properties(device).uuid), timeout)
    apart = [rank for rank in range(world.size - 1) if devices[rank] != devices[rank + 1]]
    shared = {name: ranks for name in devices if len(ranks := [r for r, d in enumerate(devices) if d == name]) > 1}
    if not shared:
        wrong = f"ranks {apart[0]} and {apart[0] + 1} are on different GPUs" if apart else "there is one rank"
        if transport == "shared":
            return False, f"transport 'shared' on CUDA needs all ranks on one GPU, but {wrong}; use 'group' or 'auto'"
        return False, None
    name, ranks = next(iter(shared.items()))
    who = f"ranks {', '.join(map(str, ranks))} share GPU {name}"
    if apart:
        return False, (
            f"{who}, but ranks {apart[0]} and {apart[0] + 1} are on different ones: no transport serves both; start "
            "one process per GPU, or put all of them on one: --device cuda:0"
        )
    if transport == "group":
        return False, f"transport 'group' takes one rank per GPU (NCCL), but {who}; use 'shared' or 'auto'"
    return True, None


def link_on_device(
    store: dist.Store,
    world: World,
    incoming: tuple[SlotLayout, InEdge] | None,
    outgoing: tuple[SlotLayout, OutEdge] | None,
    *,
    depth: int,
    device: torch.device,
    timeout: float,
    names: Sequence[str],
) -> tuple[InEdge | None, OutEdge | None] | str:
    """This rank's edges in the memory of the GPU that all ranks are on; or why some rank can't have them. Every rank
    hears the same.

    Args:
        incoming, outgoing: what travels, and the edge by which the hosts tell each other; None at the pipeline's ends.
        names: of the stages, for messages.
    """
    rank = world.rank
    inbox: DeviceInEdge | None = None
    outbox: DeviceOutEdge | None = None
    problem: str | None = None
    if incoming is not None:
        layout, heard = incoming
        try:
            inbox = DeviceInEdge(
                layout, heard, depth=depth, device=device, timeout=timeout, neighbour=f"stage {rank - 1}"
            )
            offer: dict[str, Any] = inbox.offer()
        except RuntimeError as error:
            problem = first_line(error)
            offer = {"problem": f"{names[rank]} can't open its memory to another process ({problem})"}
        store.set(f"memory-{rank}", json.dumps(offer, allow_nan=False))
    if outgoing is not None:
        layout, told = outgoing
        offer = _get(store, f"memory-{rank + 1}", timeout)
        try:
            if "problem" not in offer:
                outbox = DeviceOutEdge(
                    layout, told, offer, device=device, timeout=timeout, neighbour=f"stage {rank + 1}"
                )
                offer = outbox.offer()
        except RuntimeError as error:
            offer = {"problem": f"{names[rank]} can't open the memory of {names[rank + 1]} ({first_line(error)})"}
        store.set(f"events-{rank}", json.dumps(offer, allow_nan=False))
    offers = [_get(store, f"events-{edge}", timeout) for edge in range(world.size - 1)]
    for offer in offers:
        if "problem" in offer:
            return str(offer["problem"])
    if inbox is not None:
        inbox.take(offers[rank - 1])
    return inbox, outbox


def _get(store: dist.Store, key: str, timeout: float) -> dict[str, Any]:
    await_keys(store, [key], timeout)
    return dict(json.loads(store.get(key)))
