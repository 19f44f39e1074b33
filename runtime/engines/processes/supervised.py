"""Workers that a rank supervises, and replaces when they die."""

import contextlib
import mmap
import os
import pickle
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.ending import last_act
from unlocked.runtime.control.messages import RunFailed, Stop, stage_name
from unlocked.runtime.control.supervisor import Supervisor
from unlocked.runtime.control.zygote import WorkerLine, Zygote
from unlocked.runtime.engines.processes.carried_errors import pack_error, unpack_error
from unlocked.runtime.engines.processes.crew import Assignment, slot_layouts
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.engines.processes.options import log_slots
from unlocked.runtime.engines.processes.pairs import PairInEdge, PairLink, PairOutEdge
from unlocked.runtime.engines.processes.parcel import (
    global_state,
    loader_states,
    set_global_state,
    set_loader_states,
)
from unlocked.runtime.engines.processes.rendezvous import connect_again
from unlocked.runtime.engines.processes.start_weights import adopt_weights
from unlocked.runtime.engines.processes.telling import COORDINATOR, telling
from unlocked.runtime.engines.processes.worker import Worker, figures
from unlocked.runtime.job import needs_compiler, prepare_process
from unlocked.runtime.machine import occupy_cores
from unlocked.runtime.tensors import unpack_tensors
from unlocked.workers.slot_log import SlotLog

__all__ = ["PIECE", "SupervisedWork", "read_all"]

PIECE = 1 << 30
"""Bytes of one read or write: the system takes no more than 2 GiB at once, less one page (read(2))."""
_LONGEST_WORD = 8000  # characters of a reason that one message to the supervisor takes


class SupervisedWork:
    """Workers forked from a process that has everything ready; see `unlocked.runtime.control.zygote`.

    Args:
        on_abort: called when the run is over for a reason outside this rank; ends the process.
    """

    def __init__(self, task: Assignment, on_abort: Callable[[str], None]) -> None:
        self._task = task
        self._log = None if task.shared is not None else _make_log(task)
        self._memory = MemorySnapshot()
        self._memory.reached = task.job.start
        self._left = os.memfd_create("unlocked-result")  # what a worker leaves at its end
        if needs_compiler(task.job):
            prepare_process()  # once here instead of in every worker
        self._random = random.getstate()  # which Python draws anew in every forked process
        self._zygote = Zygote(self._work)
        self._acts = contextlib.ExitStack()
        self._acts.enter_context(last_act(lambda _: self._zygote.let_go()))
        rank = task.world.rank
        self._supervisor = Supervisor(
            task.address,
            self._zygote,
            keys=task.keys,
            stage=rank,
            rank=rank,
            layers=task.names[rank],
            position=lambda: self._memory.reached,
            on_abort=on_abort,
            **task.heartbeats,
        )
        self._supervisor.open()

    @property
    def stopped(self) -> Stop | None:
        return self._supervisor.stopped

    def build(self) -> int:
        built = self._supervisor.await_word("built")
        self._check()
        return int(built["threads"])

    def look(self, seconds: float) -> None:
        self._supervisor.look(seconds)
        self._check()

    def connect(self, store: dist.Store) -> None:
        self._zygote.say_go()

    def wait_started(self) -> None:
        self._supervisor.wait_started(self._task.options.start_timeout)
        self._check()

    def request_stop(self, signal: int | None = None) -> None:
        self._supervisor.request_stop(signal)

    def run(self) -> Mapping[str, Any]:
        end = self._supervisor.run()
        self._check()
        packed, state, loaders = pickle.loads(read_all(self._left, end.content["length"]))
        payload: dict[str, Any] = msgpack.unpackb(packed)
        adopt_weights(self._task.job, self._task.parts[self._task.world.rank], unpack_tensors(payload["weights"]))
        # What is drawn after the run goes on as if it had run here.
        set_global_state(state, switches=False)
        set_loader_states(self._task.job, loaders)
        return payload

    def close(self) -> None:
        self._supervisor.close()
        self._acts.close()
        self._memory.close()
        if self._left >= 0:
            os.close(self._left)
            self._left = -1

    def _check(self) -> None:
        """Raises what the worker has failed with."""
        end = self._supervisor.end
        if end is None or end.what == "result":
            return
        rank = self._task.world.rank
        name = stage_name(rank, rank, self._task.names[rank])
        if "text" in end.content:
            text = str(end.content["text"])
            raise RunFailed(text if name in text else f"{name} failed: {text}")
        if end.what == "failure":
            raise unpack_error(bytes(read_all(self._left, end.content["length"])))
        if end.what == "aborted":
            raise RunFailed(end.content["message"])
        raise RunFailed(f"{name} is lost: its worker {end.content['how']}")

    # --- in a worker

    def _work(self, line: WorkerLine) -> None:
        random.setstate(self._random)
        try:
            self._in_own_thread(lambda: self._train(line))
        except BaseException as error:  # to be raised by the supervisor, whatever it is
            self._leave(line, "failure", pack_error(error), str(error) or type(error).__name__)

    def _train(self, line: WorkerLine) -> None:
        task = self._task
        client = task.client(self._leaver(line), line.incarnation)
        with telling(client, task.names):
            worker = Worker(
                task.job,
                task.options,
                task.world,
                task.parts,
                client,
                task.device,
                waits=task.waits,
                memory=self._memory,
                incarnation=line.incarnation,
            )
            inbox, outbox = task.shared or self._pair(client)
            worker.connect(inbox, outbox)
            line.tell("built", threads=worker.threads)
            line.await_go()
            client.wait_started()
            if isinstance(outbox, PairOutEdge):
                outbox.start()
        with telling(client, task.names), occupy_cores(worker.cores):
            payload = worker.run()
        left = (msgpack.packb(payload), global_state(), loader_states(task.job))
        self._leave(line, "result", pickle.dumps(left))
        client.finish(figures(payload))
        client.close()
        worker.close()

    def _pair(self, client: CoordinatorClient) -> tuple[PairInEdge | None, PairOutEdge | None]:
        """This worker's ends of the links to its neighbours' workers."""
        task, rank = self._task, self._task.world.rank

        def link(edge: int, side: int) -> PairLink:
            neighbour = edge - 1 if side else edge
            return PairLink(
                connect_again(task.world, task.options.start_timeout),
                client,
                edge=edge,
                side=side,
                timeout=task.job.settings.timeout,
                neighbour=stage_name(neighbour, neighbour, task.names[neighbour]),
            )

        inbox = outbox = None
        layout, _ = slot_layouts(task.job, task.world, task.parts)
        if layout is not None:
            slots = log_slots(task.job, task.options, layout)
            inbox = PairInEdge(layout, link(rank, 1), client, depth=task.options.queue_depth, slots=slots)
        if self._log is not None:
            outbox = PairOutEdge(self._log, link(rank + 1, 0), client)
        return inbox, outbox

    def _leaver(self, line: WorkerLine) -> Callable[[str], None]:
        rank = self._task.world.rank
        name = stage_name(rank, rank, self._task.names[rank])

        def leave(message: str) -> None:
            """The run is over, or lost to this worker alone: its supervisor knows more of that."""
            cut = message.startswith((COORDINATOR, f"{name} stood still"))
            line.tell("left", message=message[:_LONGEST_WORD], cut=cut)
            os._exit(1)

        return leave

    def _leave(self, line: WorkerLine, what: str, data: bytes, in_short: str = "") -> None:
        """Leaves it to the supervisor; `in_short`: what is said of it where there is no room for all."""
        rest, place = memoryview(data), 0
        try:
            os.ftruncate(self._left, 0)
            while rest:  # a write may be a short one
                place += os.pwrite(self._left, rest[:PIECE], place)
                rest = memoryview(data)[place:]
        except OSError as error:  # no memory for it, or a limit of this process's
            text = in_short or f"its {what} has no room: {error}"
            line.tell("failure", text=text[:_LONGEST_WORD])
            return
        line.tell(what, length=len(data))

    def _in_own_thread(self, work: Callable[[], None]) -> None:
        """Where the supervisor has computed with several threads, its OpenMP library waits in a forked child for
        threads that are not there; in a thread of its own it starts new ones."""
        threads = torch.get_num_threads()
        if threads == 1:
            work()
            return
        failures: list[BaseException] = []

        def body() -> None:
            try:
                torch.set_num_threads(threads)
                work()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=body, name="stage")
        thread.start()
        thread.join()
        if failures:
            raise failures[0]


def read_all(file: int, length: int) -> bytearray:
    """The first `length` bytes of a file.

    Raises:
        OSError: it has fewer.
    """
    data = bytearray(length)
    view, place = memoryview(data), 0
    while place < length:
        count = os.preadv(file, [view[place : place + PIECE]], place)
        if not count:
            raise OSError(f"the file ends after {place} of {length} bytes")
        place += count
    return data


def _make_log(task: Assignment) -> SlotLog | None:
    """Of the outgoing edge, in memory that all workers of this stage inherit; all of it is taken now.

    Raises:
        OSError: there is not enough.
    """
    _, layout = slot_layouts(task.job, task.world, task.parts)
    if layout is None:
        return None
    slots = log_slots(task.job, task.options, layout)
    size = SlotLog.nbytes(layout, slots)
    file = os.memfd_create("unlocked-log")
    try:
        os.posix_fallocate(file, 0, size)
        return SlotLog(mmap.mmap(file, size), layout, slots)
    finally:
        os.close(file)
