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

from unlocked.runtime.control.address import KeyPair
from unlocked.runtime.control.ending import Verdict, end_process, error_line, last_act
from unlocked.runtime.control.interfaces import choose_interfaces
from unlocked.runtime.control.messages import RunFailed, Stop, stage_name
from unlocked.runtime.control.set_up import SetUp, pack_verdict
from unlocked.runtime.control.world import World
from unlocked.runtime.control.zygote import CAN_FORK
from unlocked.runtime.engines.one_process import epochs_before
from unlocked.runtime.engines.pipeline import AUTO
from unlocked.runtime.engines.processes.admission import new_keys
from unlocked.runtime.engines.processes.crew import Assignment, Crew, OwnWork, slot_layouts
from unlocked.runtime.engines.processes.device_links import pick_device
from unlocked.runtime.engines.processes.gathering import bring_weights, gather_weights
from unlocked.runtime.engines.processes.hub import Hub
from unlocked.runtime.engines.processes.link_speed import measure_links
from unlocked.runtime.engines.processes.links import share_memory
from unlocked.runtime.engines.processes.options import (
    ProcessesOptions,
    check_same_settings,
    log_slots,
    settings_of,
)
from unlocked.runtime.engines.processes.placing import Placer, order_by_machine
from unlocked.runtime.engines.processes.rendezvous import connect, exchange, gather, store_door
from unlocked.runtime.engines.processes.roll_call import RollCall, answer_roll_call
from unlocked.runtime.engines.processes.spawn import has_launcher, run_spawned
from unlocked.runtime.engines.processes.start_weights import agree_on_start_weights, remember_owners
from unlocked.runtime.engines.processes.supervised import SupervisedWork
from unlocked.runtime.engines.processes.telling import COORDINATOR, with_stage
from unlocked.runtime.engines.saver import set_others_aside
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.result import RunResult
from unlocked.runtime.settings import Settings
from unlocked.runtime.signals import StopSignals
from unlocked.runtime.tensors import unpack_tensors
from unlocked.workers.errors import CalledExitError, LinkLostError

__all__ = ["Processes"]


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
        _check_stages(job, world, self.stages)
        set_up = SetUp.begin(world)
        # A failure is told before the data is closed: a loader that hangs keeps that waiting, and the neighbours would
        # have their time out meanwhile, and be blamed.
        with contextlib.ExitStack() as closing:
            closing.callback(set_up.done)
            with _leaving_word(set_up):
                choose_interfaces(world)
                store = connect(world, self.start_timeout)
                keys = new_keys(store)
                hub = Hub(job, self, world, make_sinks) if world.rank == 0 else None
                if hub is not None:
                    closing.enter_context(last_act(hub.close_sinks))
                    roll_call = RollCall(store, world, set_up.end)
                    set_up.link(None, roll_call.tell)
                else:
                    presence = answer_roll_call(store, world, self.start_timeout)
                    set_up.link(presence, None if presence is None else lambda v: presence.send(pack_verdict(v)))
                world, machines = order_by_machine(store, world, self.start_timeout)
                set_up.world = world
                device = _device(job, world)
                placer = Placer(job, self, world, machines) if hub is not None else None
                measures = not world.is_local and _measure_links(store, world, placer, self.start_timeout)
                publish = partial(hub.publish, device, placer, store, measures) if hub and placer else None
                terms = exchange(store, world, "terms", publish, self.start_timeout)
                job = replace(job, run=terms["run"])
                parts = [range(start, stop) for start, stop in terms["parts"]]
                check_same_settings(world.rank, settings_of(job, self), terms["settings"])
                agree_on_start_weights(job, store, world, self.start_timeout)
                crew = self._crew(job, world, store, keys, parts, terms, device, set_up, hub)
                closing.callback(crew.close)
                threads = _agree_on_threads(store, world, crew, self.start_timeout)
                if hub is not None:
                    hub.learn_threads(parts, threads)
                    set_others_aside(job)  # stage 0 waits for this rank, and all others for stage 0
                crew.connect(store)
                crew.wait_started()
            # From here on a signal asks for an orderly stop, also one that a launcher sends because another worker
            # died: this worker must live to say why.
            previous = set_up.hand_over_signals()
            with StopSignals(crew.request_stop, previous=previous):
                if hub is not None:
                    roll_call.release()
                set_up.settle()
                setup = time.perf_counter() - began
                remember_owners(job, parts[world.rank])
                payload = crew.run()
            store_door().open()  # for the run that may come next
            names = [[job.network.names[i] for i in part] for part in parts]
            weights = unpack_tensors(payload["weights"])
            if hub is not None:
                told = [stage_name(i, i, layers) for i, layers in enumerate(names)]
                weights = gather_weights(store, world, weights, job.settings.timeout, told)
                result = hub.collect(parts, weights, setup_seconds=setup, stopped=crew.stopped)
            else:
                bring_weights(store, world, weights, job.settings.timeout)
                result = _own_result(job, names, payload, threads, setup_seconds=setup, stopped=crew.stopped)
            crew.close()
            if dist.is_initialized():
                dist.destroy_process_group()
        return result

    def _crew(
        self,
        job: Job,
        world: World,
        store: dist.Store,
        keys: KeyPair,
        parts: list[range],
        terms: Mapping[str, Any],
        device: torch.device,
        set_up: SetUp,
        hub: Hub | None,
    ) -> Crew:
        """Who works for this rank."""
        recovers = self._recovers(job)
        names = [stage_name(i, i, [job.network.names[j] for j in part]) for i, part in enumerate(parts)]
        shared = share_memory(
            store,
            world,
            *slot_layouts(job, world, parts),
            transport=self.transport,
            depth=self.queue_depth,
            device=device,
            timeout=job.settings.timeout,
            names=names,
            patience=self.start_timeout,
            log_slots=partial(log_slots, job, self) if recovers else lambda _: 0,
        )
        task = Assignment(
            job=job,
            options=self,
            world=world,
            parts=parts,
            address=terms["address"],
            keys=keys,
            waits=terms["waits"],
            device=device,
            shared=shared,
        )
        first_layers = [job.network.names[i] for i in parts[0]]
        if recovers and hub is not None:
            hub.expect_supervisors(self.max_recoveries)
        kind = SupervisedWork if recovers else OwnWork
        return kind(task, lambda message: _abort(message, first_layers, set_up))

    def _recovers(self, job: Job) -> bool:
        """Whether workers are processes of their own, which can be replaced."""
        return self.max_recoveries > 0 and CAN_FORK and job.device.type == "cpu" and not job.settings.compile


def _check_stages(job: Job, world: World, stages: int | str | None) -> None:
    """Raises: ValueError: another number of stages than of processes, or more than layers."""
    layers = len(job.network.blocks)
    if stages == AUTO:
        stages = None
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


def _measure_links(store: dist.Store, world: World, placer: Placer | None, timeout: float) -> bool:
    """All ranks measure, where rank 0's placement needs it."""
    told = exchange(store, world, "placing", None if placer is None else placer.read, timeout)
    if told["measure"]:
        measure_links(store, world, timeout)
    return bool(told["measure"])


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


def _abort(message: str, first_layers: Sequence[str], set_up: SetUp) -> None:
    """Ends this process at once: its main thread may be waiting inside native code."""
    rank = set_up.world.rank
    lost = message.startswith(COORDINATOR)
    message = with_stage(message, first_layers)
    if not set_up.is_over:
        if lost:
            set_up.await_verdict()  # rank 0's own word on why
        set_up.end(Verdict(message))
    is_own = message.startswith(f"stage {rank} (")  # of others' failures one line is enough
    end_process(Verdict(message), error_line(rank, message) if lost or is_own or rank == 0 else None)


def _agree_on_threads(store: dist.Store, world: World, crew: Crew, timeout: float) -> list[int]:
    """Of every stage's process, once all have built their stages. Building takes as long as it takes; the neighbours'
    time limit is for the run."""
    return [int(threads) for threads in gather(store, world, "stage-built", str(crew.build()), timeout, crew.look)]


def _own_result(
    job: Job,
    names: list[list[str]],
    payload: Mapping[str, Any],
    threads: list[int],
    *,
    setup_seconds: float,
    stopped: Stop | None,
) -> RunResult:
    """What a rank other than 0 knows: its own stage."""
    return RunResult(
        engine=job.engine,
        stages=names,
        epochs_done=epochs_before(job.plan, payload["position"]),
        steps=job.plan.steps_before(payload["position"]),
        first_step=job.plan.steps_before(job.start),
        threads=threads,
        train_seconds=payload["train_seconds"],
        setup_seconds=setup_seconds,
        weights=unpack_tensors(payload["weights"]),
        stopped_by=stopped.signal if stopped else None,
    )
