"""One worker process per stage, under torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

Activations go point to point between neighbours, in one direction only; control goes through the coordinator in rank
0's process. The micro-batches in flight at a stop or at the end of a run are always none: every stage completes the
same window of the stream.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.ending import Verdict, end_process, error_line, last_act
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.control.set_up import SetUp, pack_verdict
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.one_process import epochs_before
from unlocked.runtime.engines.processes.device_links import pick_device
from unlocked.runtime.engines.processes.hub import Hub
from unlocked.runtime.engines.processes.links import SharedRefusal
from unlocked.runtime.engines.processes.options import (
    ProcessesOptions,
    check_same_settings,
    heartbeat_timeout,
    settings_of,
)
from unlocked.runtime.engines.processes.rendezvous import connect, exchange
from unlocked.runtime.engines.processes.roll_call import RollCall, answer_roll_call
from unlocked.runtime.engines.processes.spawn import has_launcher, run_spawned
from unlocked.runtime.engines.processes.start_weights import agree_on_start_weights, remember_owners
from unlocked.runtime.engines.processes.worker import Worker
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.machine import occupy_cores
from unlocked.runtime.result import RunResult
from unlocked.runtime.settings import Settings
from unlocked.runtime.signals import StopSignals
from unlocked.runtime.tensors import unpack_tensors
from unlocked.workers.errors import CalledExitError, LinkLostError, StageError

__all__ = ["Processes"]

_COORDINATOR = "the coordinator"  # how the client begins where it misses that


@dataclass(frozen=True, kw_only=True)
class Processes(ProcessesOptions):
    """A process per stage. Under torchrun this one runs its stage; rank 0 also runs the coordinator and returns the
    whole result. Without a launcher, in a script or a notebook, this one starts all of them on its machine."""

    name: ClassVar[str] = "processes"

    def check(self, settings: Settings, global_rule: str | None) -> None:
        if global_rule is not None:
            raise ValueError(
                f"{global_rule} is not local: every layer waits for the output's error, so it can't run as a pipeline "
                f"with engine {self.name!r}; use engine sequential in one process, or streams"
            )
        with contextlib.suppress(ValueError):  # what is wrong with the environment is said when the run begins
            SetUp.join(World.from_environment())

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        if not has_launcher():
            return run_spawned(self, job, make_sinks)
        began = time.perf_counter()
        world = World.from_environment()
        num_stages = _number_of_stages(job, world, self.stages)
        set_up = SetUp.begin(world)
        # A failure is told before the data is closed: a loader that hangs keeps that waiting, and the neighbours would
        # have their time out meanwhile, and be blamed.
        with contextlib.ExitStack() as closing:
            closing.callback(set_up.done)
            with _leaving_word(set_up):
                store = connect(world, self.start_timeout)
                hub = Hub(job, self, world, make_sinks, num_stages) if world.rank == 0 else None
                if hub is not None:
                    closing.enter_context(last_act(hub.close_sinks))
                    roll_call = RollCall(store, world, set_up.end)
                    set_up.link(None, roll_call.tell)
                else:
                    presence = answer_roll_call(store, world, self.start_timeout)
                    set_up.link(presence, None if presence is None else lambda v: presence.send(pack_verdict(v)))
                device = _device(job, world)
                publish = partial(hub.publish, device) if hub else None
                terms = exchange(store, world, "terms", publish, self.start_timeout)
                job = replace(job, run=terms["run"])
                parts = [range(start, stop) for start, stop in terms["parts"]]
                names = [[job.network.names[i] for i in part] for part in parts]
                client = self._client(job, world, terms["address"], names, set_up)
                with _telling(client, names):
                    check_same_settings(settings_of(job, self), terms["settings"])
                    agree_on_start_weights(job, store, world, self.start_timeout)
                    worker = Worker(job, self, world, store, parts, client, device)
                    closing.callback(worker.close)
                    if hub is not None:
                        hub.learn_threads(parts, worker.threads)
                    client.wait_started()
            # From here on a signal asks for an orderly stop, also one that a launcher sends because another worker
            # died: this worker must live to say why.
            previous = set_up.hand_over_signals()
            with StopSignals(client.request_stop, previous=previous), _telling(client, names):
                if hub is not None:
                    roll_call.release()
                set_up.settle()
                setup = time.perf_counter() - began
                remember_owners(job, parts[world.rank])
                with occupy_cores(worker.cores):
                    payload = worker.run()
                payload["setup_seconds"] = setup
                client.finish(payload)
            result = hub.collect(parts, terms["costs"], client) if hub else _own_result(job, names, worker, payload)
            client.close()
            if dist.is_initialized():
                dist.destroy_process_group()
        return result

    def _client(self, job: Job, world: World, address: str, names: list[list[str]], set_up: SetUp) -> CoordinatorClient:
        """This rank's, which has said hello."""
        client = CoordinatorClient(
            address,
            stage=world.rank,
            rank=world.rank,
            layers=names[world.rank],
            on_abort=lambda message: _abort(message, names[0], set_up),
            start_timeout=self.start_timeout,
            heartbeat_interval=min(1.0, heartbeat_timeout(job) / 5),
            heartbeat_timeout=heartbeat_timeout(job),
        )
        client.open()
        return client


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
        device = pick_device(world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else events and messages would go to the first one
    return device


@contextlib.contextmanager
def _leaving_word(set_up: SetUp) -> Iterator[None]:
    """Whatever fails inside is what the other processes give as their reason too, where they are still in set-up."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, dist.DistError | LinkLostError | RunFailed | TimeoutError):
            set_up.await_verdict()  # more likely the consequence of another process's end
        text = str(error) or type(error).__name__
        if isinstance(error, ValueError):
            set_up.leave_word(Verdict(text, 2))
        elif isinstance(error, RunFailed):
            set_up.leave_word(Verdict(text))
        else:
            text = str(CalledExitError(error.code)) if isinstance(error, SystemExit) else text
            set_up.leave_word(Verdict(f"{stage_name(set_up.world.rank)} failed in set-up: {text}"))
        raise


@contextlib.contextmanager
def _telling(client: CoordinatorClient, names: list[list[str]]) -> Iterator[None]:
    """Whatever fails inside reaches every other worker before it leaves this one."""
    try:
        yield
    except SharedRefusal:
        raise  # all of them raise it
    except Exception as error:
        first = _tell(client, names, error)
        if first is not None:
            raise RunFailed(first) from error
        raise
    except SystemExit as error:
        called = CalledExitError(error.code)
        _tell(client, names, called)
        raise called from error


def _tell(client: CoordinatorClient, names: list[list[str]], error: Exception) -> str | None:
    """Another worker's failure, if that is behind this one's lost link."""
    if client.failure is not None:
        client.close()  # waits for its thread, which is about to end this process
        return None
    cause = error.cause if isinstance(error, StageError) else error
    is_echo = isinstance(cause, LinkLostError)
    first = client.fail(
        ", ".join(names[client.stage]),
        error.action if isinstance(error, StageError) else "set-up",
        str(cause) or type(cause).__name__,
        echo=is_echo,
    )
    is_own = not is_echo or first.startswith(f"{client.name} failed in ")
    return None if is_own else _with_stage(first, names[0])


def _abort(message: str, first_layers: Sequence[str], set_up: SetUp) -> None:
    """Ends this process at once: its main thread may be waiting inside native code."""
    rank = set_up.world.rank
    lost = message.startswith(_COORDINATOR)
    message = _with_stage(message, first_layers)
    if not set_up.is_over:
        if lost:
            set_up.await_verdict()  # rank 0's own word on why
        set_up.end(Verdict(message))
    end_process(Verdict(message), error_line(rank, message) if lost or rank == 0 else None)


def _with_stage(message: str, first_layers: Sequence[str]) -> str:
    """The coordinator's end is that of the process that it lives in."""
    return f"{stage_name(0, 0, first_layers)} is lost: {message}" if message.startswith(_COORDINATOR) else message


def _own_result(job: Job, names: list[list[str]], worker: Worker, payload: Mapping[str, Any]) -> RunResult:
    """What a rank other than 0 knows: its own stage."""
    return RunResult(
        engine=job.engine,
        stages=names,
        epochs_done=epochs_before(job.plan, worker.position),
        steps=job.plan.steps_before(worker.position),
        first_step=job.plan.steps_before(job.start),
        threads=worker.threads,
        train_seconds=payload["train_seconds"],
        setup_seconds=payload["setup_seconds"],
        weights=unpack_tensors(payload["weights"]),
        stopped_by=worker.client.stopped.signal if worker.client.stopped else None,
    )
