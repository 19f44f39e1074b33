"""One worker process per stage, under torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

Activations go point to point between neighbours, in one direction only; control goes through the coordinator in rank
0's process. The micro-batches in flight at a stop or at the end of a run are always none: every stage completes the
same window of the stream.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import stage_name
from unlocked.runtime.engines.one_process import steps_before
from unlocked.runtime.engines.processes.hub import Hub
from unlocked.runtime.engines.processes.options import (
    ProcessesOptions,
    check_same_settings,
    heartbeat_timeout,
    settings_of,
)
from unlocked.runtime.engines.processes.rendezvous import World, connect, exchange
from unlocked.runtime.engines.processes.roll_call import RollCall, answer_roll_call
from unlocked.runtime.engines.processes.worker import Worker
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.machine import occupy_cores
from unlocked.runtime.result import RunResult, unpack_tensors
from unlocked.runtime.settings import Settings
from unlocked.runtime.signals import StopSignals
from unlocked.workers.errors import LinkLostError, StageError

__all__ = ["Processes"]


@dataclass(frozen=True, kw_only=True)
class Processes(ProcessesOptions):
    """A process per stage, under torchrun: this one runs its stage; rank 0 also runs the coordinator and returns the
    whole result."""

    name: ClassVar[str] = "processes"

    def check(self, settings: Settings, global_rule: str | None) -> None:
        if global_rule is not None:
            raise ValueError(
                f"{global_rule} is not local: every layer waits for the output's error, so it can't run as a pipeline "
                f"with engine {self.name!r}; use engine sequential in one process, or streams"
            )

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        world = World.from_environment()
        num_stages = _number_of_stages(job, world, self.stages)
        began = time.perf_counter()
        store = connect(world, self.start_timeout)
        hub = Hub(job, self, world, make_sinks, num_stages) if world.rank == 0 else None
        if hub is not None:
            roll_call = RollCall(store, world, hub.lose)
        else:
            presence = answer_roll_call(store, world, self.start_timeout)
        device = _device(job, world)
        terms = exchange(store, world, "terms", partial(hub.publish, device) if hub else None, self.start_timeout)
        parts = [range(start, stop) for start, stop in terms["parts"]]
        names = [[job.network.names[i] for i in part] for part in parts]
        client = CoordinatorClient(
            terms["address"],
            stage=world.rank,
            rank=world.rank,
            layers=names[world.rank],
            on_abort=lambda message: _abort(message, world.rank, names[0], hub),
            start_timeout=self.start_timeout,
            heartbeat_timeout=heartbeat_timeout(job),
        )
        client.open()
        # From here on a signal asks for an orderly stop, also one that a launcher sends because another worker died:
        # this worker must live to say why.
        # A failure is told before the data is closed: a loader that hangs keeps that waiting, and the neighbours would
        # have their time out meanwhile, and be blamed.
        with (
            StopSignals(client.request_stop),
            contextlib.ExitStack() as opened,
            _telling(client, world, names[world.rank]),
        ):
            check_same_settings(settings_of(job, self), terms["settings"])
            worker = Worker(job, self, world, store, parts, client, device)
            opened.callback(worker.stage.close)
            client.wait_started()
            if hub is not None:
                roll_call.release()
            setup = time.perf_counter() - began
            with occupy_cores(worker.cores):
                payload = worker.run()
            payload["setup_seconds"] = setup
            client.finish(payload)
        result = hub.collect(parts, terms["costs"], client) if hub else _own_result(job, names, worker, payload)
        client.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if hub is None and presence is not None:
            presence.close()
        return result


def _number_of_stages(job: Job, world: World, stages: int | str | None) -> int:
    layers = len(job.network.blocks)
    if isinstance(stages, str):
        stages = len(job.partition([1.0] * layers, stages))
    if stages is not None and stages != world.size:
        if stages > layers:
            raise ValueError(f"{stages} stages for {layers} layers; give at most {layers}")
        raise ValueError(
            f"{stages} stages need {stages} processes, but the world size is {world.size}; start torchrun with "
            f"--nproc-per-node={stages} or leave --stages out"
        )
    if world.size > layers:
        raise ValueError(
            f"{world.size} processes for the {layers} layers of the network; a stage needs at least one "
            f"layer: start at most {layers} processes"
        )
    return world.size


def _device(job: Job, world: World) -> torch.device:
    device = job.device
    if device.type == "cuda" and device.index is None:
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {world.local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} "
                "found); start one process per GPU, or use --engine streams on one GPU"
            )
        device = torch.device("cuda", world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else events and messages would go to the first one
    return device


@contextlib.contextmanager
def _telling(client: CoordinatorClient, world: World, layers: Sequence[str]) -> Iterator[None]:
    """Whatever fails inside reaches every other worker before it leaves this one."""
    try:
        yield
    except Exception as error:
        if client.failure is None:
            cause = error.cause if isinstance(error, StageError) else error
            client.fail(
                ", ".join(layers),
                error.action if isinstance(error, StageError) else "set-up",
                str(cause) or type(cause).__name__,
                echo=isinstance(cause, LinkLostError),
            )
        raise


def _abort(message: str, rank: int, first_layers: Sequence[str], hub: "Hub | None") -> None:
    """Ends this process at once: its main thread may be waiting inside native code."""
    if hub is not None:
        hub.close_sinks(message)
    lost = message.startswith("the coordinator")
    if lost:
        message = f"{stage_name(0, 0, first_layers)} is lost: {message}"
    if lost or rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _own_result(job: Job, names: list[list[str]], worker: Worker, payload: Mapping[str, Any]) -> RunResult:
    """What a rank other than 0 knows: its own stage."""
    return RunResult(
        engine=job.engine,
        stages=names,
        steps=steps_before(job.plan, worker.position),
        train_seconds=payload["train_seconds"],
        setup_seconds=payload["setup_seconds"],
        weights=unpack_tensors(payload["weights"]),
        stopped_by=worker.client.stopped.signal if worker.client.stopped else None,
    )
