"""How the processes of a run find each other: the environment that launchers set, and torch's key-value store.

The store is a file where this project's own launcher has started them, and a server otherwise: torchrun's own, or one
of rank 0's that listens where `interfaces` says.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed as dist

from unlocked.runtime.control.entrance import Door
from unlocked.runtime.control.interfaces import listening_host, meeting_host
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.control.world import World, attempt

__all__ = ["MEETING", "await_keys", "connect", "connect_again", "exchange", "gather", "meeting_folder", "store_door"]

MEETING = "UNLOCKED_MEETING"
"""The variable by which this project's own launcher names the folder (the user's alone) in which processes meet."""

_HANDSHAKE_SECONDS = 5.0
_SEEN_SECONDS = 5.0
_AGENT_SECONDS = 2.0  # who finds no store of torchrun's on this machine has lost its launcher
_runs = count()  # of this process
_run = ""  # the name of the latest one
_stores: dict[tuple[str, int], dist.Store] = {}  # kept open until the process ends
_door = Door(None)  # of the latest store that this process serves
_LONGEST_PAUSE = 0.25  # seconds between two questions to the store


def meeting_folder() -> Path | None:
    """Where this run's processes meet without a port; None: at MASTER_ADDR:MASTER_PORT."""
    folder = os.environ.get(MEETING)
    return Path(folder) if folder else None


def connect(world: World, timeout: float) -> dist.Store:
    """The run's part of the processes' key-value store: torchrun's own where there is one, else served by rank 0.

    One store serves all runs of a process: a second server on the same port could take a rank that is early for the
    next run. Each run of each attempt has keys of its own; all ranks do the same runs in the same order.

    Raises:
        ValueError: the port is taken, or nobody answers at MASTER_ADDR:MASTER_PORT within `timeout` seconds.
    """
    serve = world.rank == 0 and not _served_by_agent()
    where = (str(meeting_folder() or meeting_host(world)), world.master_port)
    store = _stores.get(where)
    if store is None:
        if not serve and meeting_folder() is None:
            _await_listener(world, timeout)
        try:
            store = _stores[where] = _open_store(world, serve, timeout)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(_no_store(world, serve)) from error
    store.set_timeout(timedelta(seconds=timeout))
    _door.open()
    global _run
    _run = f"attempt-{attempt()}/run-{next(_runs)}"
    return dist.PrefixStore(_run, store)


def store_door() -> Door:
    """That of the store's port, if this process serves the store: torch's takes whoever comes, a descriptor each."""
    return _door


def connect_again(world: World, timeout: float) -> dist.Store:
    """The same part of the store by a connection of its own: in a forked process, which must not use its parent's, or
    for another thread.

    Raises:
        ValueError: nobody answers within `timeout` seconds.
    """
    try:
        return dist.PrefixStore(_run, _open_store(world, False, timeout))
    except (RuntimeError, ValueError) as error:
        raise ValueError(_no_store(world, False)) from error


def await_keys(
    store: dist.Store, keys: Sequence[str], timeout: float, pause: Callable[[float], None] = time.sleep
) -> None:
    """Waits until all of the keys are there.

    By asking again and again: a wait inside the store would hold the main thread, and its signals, until its end.

    Args:
        pause: what is done for so many seconds between two questions.

    Raises:
        TimeoutError: they are not there after `timeout` seconds.
        RuntimeError: the store is gone.
    """
    deadline, seconds = time.monotonic() + timeout, 0.002
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{', '.join(keys)}: not there after {timeout:g} s")
        pause(seconds)
        seconds = min(2 * seconds, _LONGEST_PAUSE)


def _served_by_agent() -> bool:
    """torchrun's own process holds the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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
            store.set(key, json.dumps({"error": str(error), "mistake": isinstance(error, ValueError)}, allow_nan=False))
            # This process may be the one that serves the store: the others must have read it before it ends.
            with contextlib.suppress(RuntimeError, TimeoutError):
                await_keys(store, [f"{key}-seen-{rank}" for rank in range(1, world.size)], _SEEN_SECONDS)
            raise
        store.set(key, json.dumps(content, allow_nan=False))
        return content["value"]
    try:
        await_keys(store, [key], timeout)
        content = json.loads(store.get(key))
        store.set(f"{key}-seen-{world.rank}", "")
    except (RuntimeError, TimeoutError) as error:
        raise RunFailed(
            f"{stage_name(0)} is lost: it ended during its set-up, or did not say within {timeout:g} s what to run"
        ) from error
    if "error" in content:
        raise ValueError(content["error"]) if content["mistake"] else RunFailed(content["error"])
    value: dict[str, Any] = content["value"]
    return value


def gather(
    store: dist.Store,
    world: World,
    key: str,
    value: str,
    timeout: float,
    pause: Callable[[float], None] = time.sleep,
    names: Sequence[str] = (),
) -> list[str]:
    """Every rank's `value`, by rank, once all ranks are here.

    The last one to come writes them all into one place, so that the others ask for one key instead of for all ranks':
    what a thousand ranks ask of the store does not grow with the square of their number.

    Args:
        pause: as in `await_keys`.
        names: of the ranks, for the error.

    Raises:
        TimeoutError: names the ranks that did not come in time.
    """
    keys = [f"{key}-{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], value)
    if store.add(f"{key}-count", 1) == world.size:
        values = [store.get(one).decode() for one in keys]
        store.set(key, json.dumps(values, allow_nan=False))
        return values
    try:
        await_keys(store, [key], timeout, pause)
    except TimeoutError as error:
        told = names or [f"rank {rank}" for rank in range(world.size)]
        missing = [name for name, one in zip(told, keys, strict=True) if not store.check([one])]
        raise TimeoutError(f"{key}: {', '.join(missing)} did not come within {timeout:g} s") from error
    return list(json.loads(store.get(key)))


def _open_store(world: World, serve: bool, timeout: float) -> dist.Store:
    """Opens the store, or gives up on a port at which something else than a store listens and never answers."""
    folder = meeting_folder()
    if folder is not None:
        return dist.FileStore(str(folder / "store"))
    opened: list[dist.TCPStore | Exception] = []

    def open_it() -> None:
        try:
            store = dist.TCPStore(
                meeting_host(world),
                world.master_port,
                world.size,
                is_master=serve,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                master_listen_fd=_listen(world) if serve else None,
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


def _listen(world: World) -> int:
    """The descriptor of a bound socket: torch would bind one of its own to every interface."""
    host = listening_host(world)
    if not host:
        print(
            f"MASTER_ADDR {world.master_address} is no address of this machine's own: the store and the coordinator "
            "listen on every interface",
            file=sys.stderr,
        )
        host = "::" if socket.has_dualstack_ipv6() else ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::"
    listener = socket.create_server((host, world.master_port), family=family, backlog=1024, dualstack_ipv6=both)
    global _door
    _door = Door(listener)  # keeps the port as long as this process lives, as the store does
    return os.dup(listener.fileno())


def _await_listener(world: World, timeout: float) -> None:
    """Rank 0 may start later than we do: wait until its port is open. torchrun's agent has opened it before."""
    if _served_by_agent() and world.is_local:
        timeout = min(timeout, _AGENT_SECONDS)
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((meeting_host(world), world.master_port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                who, what = ("torchrun", "it runs") if _served_by_agent() else ("rank 0", "rank 0 runs")
                raise ValueError(
                    f"{who} did not open {world.master_address}:{world.master_port} within {timeout:g} s ({error}); "
                    f"check MASTER_ADDR, MASTER_PORT and that {what}"
                ) from error
            time.sleep(0.05)
