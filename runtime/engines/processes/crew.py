"""Who works for a rank: this process itself, or workers that it supervises and replaces when they die."""

import mmap
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgpack
import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import RunFailed, Stop, stage_name
from unlocked.runtime.control.supervisor import Supervisor
from unlocked.runtime.control.world import World
from unlocked.runtime.control.zygote import WorkerLine, Zygote
from unlocked.runtime.engines.processes.carried_errors import pack_error, unpack_error
from unlocked.runtime.engines.processes.links import link_group
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.engines.processes.options import ProcessesOptions, heartbeat_timeout, log_slots
from unlocked.runtime.engines.processes.pairs import PairInEdge, PairLink, PairOutEdge
from unlocked.runtime.engines.processes.parcel import (
    global_state,
    loader_states,
    set_global_state,
    set_loader_states,
)
from unlocked.runtime.engines.processes.rendezvous import connect_again
from unlocked.runtime.engines.processes.start_weights import adopt_weights
from unlocked.runtime.engines.processes.telling import telling
from unlocked.runtime.engines.processes.worker import Worker
from unlocked.runtime.job import Job, needs_compiler, prepare_process
from unlocked.runtime.machine import occupy_cores
from unlocked.runtime.tensors import unpack_tensors
from unlocked.workers.cargo import make_layout
from unlocked.workers.edges import SlotLayout
from unlocked.workers.shared_edges import SharedInEdge, SharedOutEdge
from unlocked.workers.slot_log import SlotLog

__all__ = ["Assignment", "Crew", "OwnWork", "SupervisedWork", "slot_layouts"]

Shared = tuple[SharedInEdge | None, SharedOutEdge | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a rank has to do in a run.

    Attributes:
        parts: the layers of each stage.
        address: the coordinator's.
        waits: rank 0 has a metrics sink that is to hear of every epoch before the next one begins.
        shared: this stage's edges in memory; None: through a process group.
    """

    job: Job
    options: ProcessesOptions
    world: World
    parts: Sequence[range]
    address: str
    waits: bool
    device: torch.device
    shared: Shared | None

    @property
    def names(self) -> list[list[str]]:
        """The layer names of each stage."""
        return [[self.job.network.names[i] for i in part] for part in self.parts]

    @property
    def heartbeats(self) -> dict[str, float]:
        """How often there are signs of life, and how long they may be missing."""
        timeout = heartbeat_timeout(self.job)
        return {"heartbeat_interval": min(1.0, timeout / 5), "heartbeat_timeout": timeout}

    def client(self, on_abort: Callable[[str], None], incarnation: int = 0) -> CoordinatorClient:
        """A worker's way to the coordinator; it has said hello."""
        rank = self.world.rank
        client = CoordinatorClient(
            self.address,
            stage=rank,
            rank=rank,
            layers=self.names[rank],
            on_abort=on_abort,
            start_timeout=self.options.start_timeout,
            incarnation=incarnation,
            **self.heartbeats,
        )
        client.open()
        return client


class Crew(Protocol):
    """Use: construct, `build`, `connect`, `wait_started`, `run`, `close`. All but the first can raise what a stage's
    work can raise."""

    @property
    def stopped(self) -> Stop | None:
        """Set once an orderly stop is under way."""
        ...

    def build(self) -> int:
        """Builds the stage; the number of its intra-op threads."""
        ...

    def connect(self, store: dist.Store) -> None:
        """Makes the edges; every rank has built its stage by now."""
        ...

    def wait_started(self) -> None:
        """Until all are there."""
        ...

    def request_stop(self, signal: int | None = None) -> None:
        """Asks for an orderly stop of all stages; safe in a signal handler."""
        ...

    def run(self) -> Mapping[str, Any]:
        """The stage's whole work; what it came to."""
        ...

    def close(self) -> None:
        """Idempotent."""
        ...


class OwnWork:
    """This process works itself; its end is the run's.

    Args:
        on_abort: called from a thread when the run is over for a reason outside this rank; ends the process.
    """

    def __init__(self, task: Assignment, on_abort: Callable[[str], None]) -> None:
        self._task = task
        self._client = task.client(on_abort)
        self._worker: Worker | None = None

    @property
    def stopped(self) -> Stop | None:
        return self._client.stopped

    def build(self) -> int:
        task = self._task
        with telling(self._client, task.names):
            self._worker = Worker(
                task.job, task.options, task.world, task.parts, self._client, task.device, waits=task.waits
            )
            return self._worker.threads

    def connect(self, store: dist.Store) -> None:
        task = self._task
        assert self._worker is not None
        with telling(self._client, task.names):
            edges: Any = task.shared
            if edges is None:
                depth, timeout = task.options.queue_depth, task.job.settings.timeout
                layouts = slot_layouts(task.job, task.world, task.parts)
                edges = link_group(
                    store,
                    task.world,
                    *layouts,
                    transport=task.options.transport,
                    depth=depth,
                    device=task.device,
                    timeout=timeout,
                    names=[stage_name(i, i, layers) for i, layers in enumerate(task.names)],
                )
            self._worker.connect(*edges)

    def wait_started(self) -> None:
        with telling(self._client, self._task.names):
            self._client.wait_started()

    def request_stop(self, signal: int | None = None) -> None:
        self._client.request_stop(signal)

    def run(self) -> Mapping[str, Any]:
        worker = self._worker
        assert worker is not None
        with telling(self._client, self._task.names), occupy_cores(worker.cores):
            payload = worker.run()
        self._client.finish(payload)
        return payload

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._client.close()


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
        self._zygote = Zygote(self._work)
        rank = task.world.rank
        self._supervisor = Supervisor(
            task.address,
            self._zygote,
            stage=rank,
            rank=rank,
            layers=task.names[rank],
            position=lambda: self._memory.reached,
            on_abort=on_abort,
            **task.heartbeats,
        )
        self._zygote.start(0)

    @property
    def stopped(self) -> Stop | None:
        return self._supervisor.stopped

    def build(self) -> int:
        built = self._supervisor.await_word("built")
        self._check()
        return int(built["threads"])

    def connect(self, store: dist.Store) -> None:
        self._supervisor.open()
        self._zygote.say_go()

    def wait_started(self) -> None:
        self._supervisor.wait_started(self._task.options.start_timeout)
        self._check()

    def request_stop(self, signal: int | None = None) -> None:
        self._supervisor.request_stop(signal)

    def run(self) -> Mapping[str, Any]:
        end = self._supervisor.run()
        self._check()
        packed, state, loaders = pickle.loads(os.pread(self._left, end.content["length"], 0))
        payload: dict[str, Any] = msgpack.unpackb(packed)
        adopt_weights(self._task.job, self._task.parts[self._task.world.rank], unpack_tensors(payload["weights"]))
        # What is drawn after the run goes on as if it had run here.
        set_global_state(state, switches=False)
        set_loader_states(self._task.job, loaders)
        return payload

    def close(self) -> None:
        self._supervisor.close()
        self._memory.close()
        if self._left >= 0:
            os.close(self._left)
            self._left = -1

    def _check(self) -> None:
        """Raises what the worker has failed with."""
        end = self._supervisor.end
        if end is None or end.what == "result":
            return
        if end.what == "failure":
            raise unpack_error(os.pread(self._left, end.content["length"], 0))
        rank = self._task.world.rank
        raise RunFailed(f"{stage_name(rank, rank, self._task.names[rank])} is lost: its worker {end.content['how']}")

    # --- in a worker

    def _work(self, line: WorkerLine) -> None:
        try:
            self._in_own_thread(lambda: self._train(line))
        except BaseException as error:  # to be raised by the supervisor, whatever it is
            self._leave(line, "failure", pack_error(error))

    def _train(self, line: WorkerLine) -> None:
        task = self._task
        client = task.client(lambda _: os._exit(1), line.incarnation)
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
        client.finish(payload)
        client.close()
        worker.close()

    def _pair(self, client: CoordinatorClient) -> tuple[PairInEdge | None, PairOutEdge | None]:
        """This worker's ends of the links to its neighbours' workers."""
        task, rank = self._task, self._task.world.rank

        def link(edge: int, side: int) -> PairLink:
            neighbour = edge - 1 if side else edge
            return PairLink(
                lambda: connect_again(task.world, task.options.start_timeout),
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

    def _leave(self, line: WorkerLine, what: str, data: bytes) -> None:
        os.ftruncate(self._left, 0)
        for start in range(0, len(data), 1 << 30):
            os.pwrite(self._left, data[start : start + (1 << 30)], start)
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


def slot_layouts(job: Job, world: World, parts: Sequence[range]) -> tuple[SlotLayout | None, SlotLayout | None]:
    """What travels on the edges into and out of this rank's stage; None at the ends of the pipeline."""

    def layout(first_layer: int) -> SlotLayout:
        shape, traffic = job.network.output_shapes[first_layer - 1], job.network.side_channel.traffic(first_layer - 1)
        return make_layout(job.plan.max_rows, shape, job.storage, traffic, job.network.target)

    rank, last = world.rank, world.size - 1
    return layout(parts[rank].start) if rank > 0 else None, layout(parts[rank].stop) if rank < last else None
