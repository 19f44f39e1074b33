"""How the processes of a run find each other: the environment that launchers set, and torch's key-value store."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.fields import from_environment, setting

__all__ = ["World", "connect", "exchange", "meet"]

_HANDSHAKE_SECONDS = 5.0
_SEEN_SECONDS = 5.0
_runs = count()  # of this process
_stores: dict[tuple[str, int], dist.TCPStore] = {}  # kept open until the process ends
_MOST_PROCESSES = 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them."""

    rank: int = setting(help="of this process, from 0", variable="RANK", at_least=0, at_most=_MOST_PROCESSES - 1)
    size: int = setting(help="number of all processes", variable="WORLD_SIZE", at_least=1, at_most=_MOST_PROCESSES)
    local_rank: int = setting(
        help="among the processes of this machine", variable="LOCAL_RANK", at_least=0, at_most=_MOST_PROCESSES - 1
    )
    local_size: int = setting(
        help="number of this machine's processes", variable="LOCAL_WORLD_SIZE", at_least=1, at_most=_MOST_PROCESSES
    )
    master_address: str = setting(help="the machine of rank 0", variable="MASTER_ADDR")
    master_port: int = setting(help="of rank 0's store", variable="MASTER_PORT", at_least=1, at_most=65535)

    @property
    def is_local(self) -> bool:
        """All processes run on this machine."""
        return self.local_size == self.size

    @classmethod
    def from_environment(cls) -> "World":
        """Reads what torchrun (or another launcher) has set.

        Raises:
            ValueError: a variable is missing, no number, or out of its range.
        """
        set_ = os.environ
        default_size = set_.get("WORLD_SIZE", "") if set_.get("MASTER_ADDR") in _LOOPBACK else "1"
        default = {"LOCAL_RANK": set_.get("RANK", ""), "LOCAL_WORLD_SIZE": default_size}
        try:
            world = from_environment(cls, {**default, **set_})
        except KeyError as error:
            raise ValueError(
                f"the processes engine needs a launcher, but {error.args[0]} is not set; start it with "
                "'torchrun --standalone --nproc-per-node=N launch/pipeline.py ...', or use --engine sequential"
            ) from None
        pairs = [("RANK", world.rank, "WORLD_SIZE", world.size)]
        if default.keys() <= set_.keys():
            pairs.append(("LOCAL_RANK", world.local_rank, "LOCAL_WORLD_SIZE", world.local_size))
        for name, rank, total, size in pairs:
            if rank >= size:
                raise ValueError(f"{name} is {rank}, but {total} is {size}; ranks run from 0 to {size - 1}")
        return world


def connect(world: World, timeout: float) -> dist.Store:
    """The run's part of the processes' key-value store: torchrun's own where there is one, else served by rank 0.

    One store serves all runs of a process: a second server on the same port could take a rank that is early for the
    next run. Each run of each attempt has keys of its own; all ranks do the same runs in the same order.

    Raises:
        ValueError: the port is taken, or nobody answers at MASTER_ADDR:MASTER_PORT within `timeout` seconds.
    """
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = world.rank == 0 and not served_by_agent
    where = (world.master_address, world.master_port)
    store = _stores.get(where)
    if store is None:
        if not serve:
            _await_listener(world, timeout)
        try:
            store = _stores[where] = _open_store(world, serve, timeout)
        except (RuntimeError, ValueError) as error:
            raise ValueError(_no_store(world, serve)) from error
    store.set_timeout(timedelta(seconds=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt-{attempt}/run-{next(_runs)}", store)


def _no_store(world: World, serve: bool) -> str:
    where = f"{world.master_address}:{world.master_port}"
    if serve:
        return (
            f"port {world.master_port} on {world.master_address} is taken or not this machine's; choose another "
            "MASTER_PORT"
        )
    return (
        f"{where} does not answer as rank 0 of this run: another program may hold the port, or rank 0 failed; choose "
        "another MASTER_PORT"
    )


def exchange(
    store: dist.Store, world: World, key: str, produce: Callable[[], dict[str, Any]] | None, timeout: float
) -> dict[str, Any]:
    """Rank 0 (the one with `produce`) tells all others; its failure reaches them as well.

    Raises:
        ValueError, RunFailed: rank 0's message, on every rank: a user's mistake, or anything else.
    """
    if produce is not None:
        try:
            content = {"value": produce()}
        except Exception as error:
            store.set(key, json.dumps({"error": str(error), "mistake": isinstance(error, ValueError)}))
            # This process may be the one that serves the store: the others must have read it before it ends.
            with contextlib.suppress(RuntimeError):
                store.wait([f"{key}-seen-{rank}" for rank in range(1, world.size)], timedelta(seconds=_SEEN_SECONDS))
            raise
        store.set(key, json.dumps(content))
        return content["value"]
    try:
        store.wait([key], timedelta(seconds=timeout))
        content = json.loads(store.get(key))
        store.set(f"{key}-seen-{world.rank}", "")
    except RuntimeError as error:
        raise RunFailed(
            f"{stage_name(0)} is lost: it ended during its set-up, or did not say within {timeout:g} s what to run"
        ) from error
    if "error" in content:
        raise ValueError(content["error"]) if content["mistake"] else RunFailed(content["error"])
    value: dict[str, Any] = content["value"]
    return value


def meet(store: dist.Store, world: World, key: str, timeout: float) -> None:
    """Waits until all ranks are here.

    Raises:
        TimeoutError: names the ranks that did not come in time.
    """
    keys = [f"{key}-{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], "")
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError as error:
        missing = [str(rank) for rank in range(world.size) if not store.check([keys[rank]])]
        raise TimeoutError(f"{key}: rank {', '.join(missing)} is not there after {timeout:g} s") from error


def _open_store(world: World, serve: bool, timeout: float) -> dist.TCPStore:
    """Opens the store, or gives up on a port at which something else than a store listens and never answers."""
    opened: list[dist.TCPStore | Exception] = []

    def open_it() -> None:
        try:
            store = dist.TCPStore(
                world.master_address,
                world.master_port,
                world.size,
                is_master=serve,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
            opened.append(store)
        except Exception as error:  # raised where it can be caught
            opened.append(error)

    # The handshake has no time limit of its own, so it gets a thread that can be left behind.
    thread = threading.Thread(target=open_it, name="store-handshake", daemon=True)
    thread.start()
    thread.join(_HANDSHAKE_SECONDS)
    if not opened:
        raise RuntimeError(f"no handshake within {_HANDSHAKE_SECONDS:g} s")
    if isinstance(opened[0], Exception):
        raise opened[0]
    return opened[0]


def _await_listener(world: World, timeout: float) -> None:
    """Rank 0 may start later than we do: wait until its port is open."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((world.master_address, world.master_port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank 0 did not open {world.master_address}:{world.master_port} within {timeout:g} s ({error}); "
                    "check MASTER_ADDR, MASTER_PORT and that rank 0 runs"
                ) from error
            time.sleep(0.05)
