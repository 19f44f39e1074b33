"""Who works for a rank: this process itself; or workers that it supervises, see `supervised`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from unlocked.runtime.control.address import KeyPair
from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import Stop, stage_name
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.links import link_group
from unlocked.runtime.engines.processes.options import ProcessesOptions, heartbeat_timeout
from unlocked.runtime.engines.processes.telling import telling
from unlocked.runtime.engines.processes.worker import Worker, figures
from unlocked.runtime.job import Job
from unlocked.runtime.machine import occupy_cores
from unlocked.workers.edges import SlotLayout
from unlocked.workers.shared_edges import SharedInEdge, SharedOutEdge

__all__ = ["Assignment", "Crew", "OwnWork", "slot_layouts"]

Shared = tuple[SharedInEdge | None, SharedOutEdge | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a rank has to do in a run.

    Attributes:
        parts: the layers of each stage.
        address: the coordinator's.
        keys: by which it knows this rank's processes.
        waits: rank 0 has a metrics sink that is to hear of every epoch before the next one begins.
        shared: this stage's edges in memory; None: through a process group.
    """

    job: Job
    options: ProcessesOptions
    world: World
    parts: Sequence[range]
    address: str
    keys: KeyPair
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
            keys=self.keys,
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

    def look(self, seconds: float) -> None:
        """What to do for so long where this rank waits for the others to build theirs."""
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

    def look(self, seconds: float) -> None:
        time.sleep(seconds)

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
        self._client.finish(figures(payload))
        return payload

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        self._client.close()


def slot_layouts(job: Job, world: World, parts: Sequence[range]) -> tuple[SlotLayout | None, SlotLayout | None]:
    """What travels on the edges into and out of this rank's stage; None at the ends of the pipeline."""
    own = parts[world.rank]
    incoming = job.slot_layout(own.start - 1) if world.rank > 0 else None
    return incoming, job.slot_layout(own.stop - 1) if world.rank < world.size - 1 else None
