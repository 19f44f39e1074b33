"""How neighbouring stages reach each other: shared memory on one machine, a torch.distributed group otherwise."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from unlocked.runtime.control.ending import last_act
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.device_links import link_on_device, may_share
from unlocked.runtime.engines.processes.rendezvous import await_keys, gather
from unlocked.workers.device_edges import SIGNAL
from unlocked.workers.edges import InEdge, OutEdge, SlotLayout, make_edges
from unlocked.workers.errors import LinkLostError
from unlocked.workers.shared_edges import SharedInEdge, SharedListener, SharedOutEdge

__all__ = ["TRANSPORTS", "SharedRefusal", "link_group", "link_stages", "share_memory"]

TRANSPORTS = ("auto", "shared", "group")
_PATIENCE = 4  # times the edges' own time limit


class SharedRefusal(ValueError):
    """Shared memory was asked for where it is not possible; every rank says so."""


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
        transport: "shared" (the memory of one machine's CPUs, or of one GPU that all ranks are on), "group" (Gloo, or
            NCCL with one rank per GPU), or "auto": shared where all edges can be made so, which is tried.
        names: of the stages, for messages.

    Raises:
        ValueError: shared memory was asked for where it is not possible, on every rank.
        LinkLostError: a neighbour did not come.
    """
    shared = share_memory(
        store, world, incoming, outgoing, transport=transport, depth=depth, device=device, timeout=timeout, names=names
    )
    if shared is not None:
        return shared
    return link_group(
        store, world, incoming, outgoing, transport=transport, depth=depth, device=device, timeout=timeout, names=names
    )


def link_group(
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
    """The edges where they are not in the machine's memory: in that of one GPU, or through a process group of all
    ranks. Arguments are those of `link_stages`."""
    if device.type == "cuda":
        on_device, problem = may_share(store, world, device, transport, timeout)
        if on_device:
            return _link_on_device(store, world, incoming, outgoing, depth, device, timeout, names)
        if problem is not None:
            raise SharedRefusal(problem)
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


def share_memory(
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
    patience: float | None = None,
    log_slots: Callable[[SlotLayout], int] = lambda _: 0,
) -> tuple[SharedInEdge | None, SharedOutEdge | None] | None:
    """The edges in shared memory; None where some edge can't have it, or another transport was asked for.

    Args:
        patience: seconds that the others may take to come, who may be busy with their set-up; default: `timeout`.
        log_slots: how many slots an edge's ring should have; fewer where there is no room.
        The others are those of `link_stages`.

    Raises: as `link_stages` does.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"transport {transport!r} is not known; valid: {', '.join(TRANSPORTS)}")
    if transport == "shared" and device.type not in ("cpu", "cuda"):
        raise SharedRefusal(f"transport 'shared' needs stages on CPUs, not on {device.type}; use 'group' or 'auto'")
    if transport == "group" or device.type != "cpu":
        return None
    shared = _SharedLinks(store, world, incoming, outgoing, depth, timeout, names, patience, log_slots)
    problem = shared.agree()
    if problem is None:
        return shared.inbox, shared.outbox
    shared.close()
    if transport == "shared":
        raise SharedRefusal(f"transport 'shared' is not possible: {problem}; use 'group' or 'auto'")
    if world.rank == 0:
        print(f"edges go through a process group, which is slower than memory: {problem}", file=sys.stderr)
    return None


def _link_on_device(
    store: dist.Store,
    world: World,
    incoming: SlotLayout | None,
    outgoing: SlotLayout | None,
    depth: int,
    device: torch.device,
    timeout: float,
    names: Sequence[str],
) -> tuple[InEdge | None, OutEdge | None]:
    """Edges in the memory of a GPU that all ranks share, with edges in the machine's memory by which hosts tell each
    other."""
    signals = [None if layout is None else SIGNAL for layout in (incoming, outgoing)]
    shared = _SharedLinks(store, world, signals[0], signals[1], depth, timeout, names)
    problem = shared.agree()
    if problem is None:
        heard = None if incoming is None or shared.inbox is None else (incoming, shared.inbox)
        told = None if outgoing is None or shared.outbox is None else (outgoing, shared.outbox)
        edges = link_on_device(store, world, heard, told, depth=depth, device=device, timeout=timeout, names=names)
        if not isinstance(edges, str):
            return edges
        problem = edges
    shared.close()
    raise SharedRefusal(
        f"ranks that share a GPU can't be linked: {problem}; use --engine streams, which has one process, or one "
        "process per GPU"
    )


class _SharedLinks:
    """This rank's edges in shared memory, of use only if all ranks could make theirs.

    Whether two ranks share a memory is tried: host names and boot numbers say nothing of containers.
    """

    def __init__(
        self,
        store: dist.Store,
        world: World,
        incoming: SlotLayout | None,
        outgoing: SlotLayout | None,
        depth: int,
        timeout: float,
        names: Sequence[str],
        patience: float | None = None,
        log_slots: Callable[[SlotLayout], int] = lambda _: 0,
    ) -> None:
        self.inbox: SharedInEdge | None = None
        self.outbox: SharedOutEdge | None = None
        self._store, self._world, self._names, self._timeout = store, world, names, timeout
        self._incoming, self._outgoing, self._depth = incoming, outgoing, depth
        self._patience = timeout if patience is None else patience
        self._log_slots = log_slots

    def agree(self) -> str | None:
        """Makes the edges; why some rank could not, or None. Every rank hears the same."""
        with contextlib.ExitStack() as stack:
            listener = None
            if self._incoming is not None:
                listener, offer = self._offer(self._incoming)
                if listener is not None:
                    stack.callback(listener.close)
                    stack.enter_context(last_act(lambda _: listener.close()))
                self._store.set(f"edge-{self._world.rank}", json.dumps(offer, allow_nan=False))
            own = None if self._outgoing is None else self._reach(self._outgoing)
            everybody = gather(self._store, self._world, "link", own or "", self._patience, names=self._names)
            problems = [text for text in everybody if text]
            if problems:
                return problems[0] + (f" (and {len(problems) - 1} edges more)" if len(problems) > 1 else "")
            if listener is not None:
                self.inbox = listener.accept(self._names[self._world.rank - 1])
        return None

    def close(self) -> None:
        if self.outbox is not None:
            self.outbox.close()

    def _offer(self, layout: SlotLayout) -> tuple[SharedListener | None, dict[str, Any]]:
        try:
            slots = self._log_slots(layout)
            listener = SharedListener(layout, depth=self._depth, timeout=self._timeout, log_slots=slots)
        except OSError as error:
            return None, {"problem": f"{self._names[self._world.rank]}: {error}"}
        return listener, {"address": listener.address, "slots": listener.slots}

    def _reach(self, layout: SlotLayout) -> str | None:
        """Opens the edge to the next rank, or says why not."""
        key = f"edge-{self._world.rank + 1}"
        neighbour = self._names[self._world.rank + 1]
        try:
            await_keys(self._store, [key], self._patience)
        except TimeoutError as error:
            raise TimeoutError(f"{neighbour} did not come within {self._patience:g} s") from error
        offer = json.loads(self._store.get(key))
        if "problem" in offer:
            return str(offer["problem"])
        try:
            self.outbox = SharedOutEdge(
                layout,
                offer["address"],
                depth=self._depth,
                timeout=self._timeout,
                neighbour=neighbour,
                slots=offer["slots"],
            )
        except LinkLostError as error:
            return f"{self._names[self._world.rank]} {error}"
        return None
