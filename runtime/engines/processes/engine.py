"""One worker process per stage, under torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

Activations go point to point between neighbours, in one direction only; control goes through the coordinator in rank
0's process. The micro-batches in flight at a stop or at the end of a run are always none: every stage completes the
same window of the stream.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.messages import RunFailed, stage_name
from unlocked.runtime.control.windows import EpochGate
from unlocked.runtime.engines.one_process import steps_before
from unlocked.runtime.engines.pipeline import PipelineOptions
from unlocked.runtime.engines.processes.links import TRANSPORTS, link_stages
from unlocked.runtime.engines.processes.rendezvous import World, connect, exchange, meet
from unlocked.runtime.engines.processes.roll_call import RollCall, answer_roll_call
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.machine import occupy_cores, own_cores, peak_memory_bytes
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.metrics.trace import write_chrome_trace
from unlocked.runtime.result import RunResult, pack_tensors, unpack_tensors, weights_digest
from unlocked.runtime.saving.snapshots import load_layers, save_layers, snapshot_folder, write_manifest
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.settings import Settings, setting
from unlocked.runtime.signals import StopSignals
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError, StageError
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch, TimedAction

__all__ = ["Processes"]

_READ_AHEAD = 2  # micro-batches of resident data that a thread assembles for stage 0
_SINKS_SECONDS = 3.0  # that sinks may take to close when the run is aborted
_HEARTBEAT_SECONDS = 30.0  # of silence, after which a process counts as lost


@dataclass(frozen=True, kw_only=True)
class Processes(PipelineOptions):
    """A process per stage, under torchrun: this one runs its stage; rank 0 also runs the coordinator and returns the
    whole result."""

    name: ClassVar[str] = "processes"

    transport: str = setting(
        "auto", "between processes: auto, shared (memory of one machine) or group (Gloo, NCCL)", choices=TRANSPORTS
    )
    pin: bool = setting(
        True,
        "keep each of a machine's processes on cores of its own (on a CPU)",
        off="let processes of one machine share its cores freely",
    )
    start_timeout: float = setting(
        120.0, "seconds that all processes may take to appear, build their stages and connect", above=0
    )
    coordinator_port: int = setting(
        0, "port of the coordinator, in rank 0 (0: any free one)", at_least=0, at_most=65535
    )

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
        hub = _Hub(job, self, world, make_sinks, num_stages) if world.rank == 0 else None
        if hub is not None:
            roll_call = RollCall(store, world, hub.lose)
        else:
            presence = answer_roll_call(store, world, self.start_timeout)
        device = _device(job, world)
        plan = exchange(store, world, "plan", partial(hub.publish, device) if hub else None, self.start_timeout)
        parts = [range(start, stop) for start, stop in plan["parts"]]
        names = [[job.network.names[i] for i in part] for part in parts]
        client = CoordinatorClient(
            plan["address"],
            stage=world.rank,
            rank=world.rank,
            layers=names[world.rank],
            on_abort=lambda message: _abort(message, world.rank, names[0], hub),
            start_timeout=self.start_timeout,
            heartbeat_timeout=_heartbeat_timeout(job),
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
            _check_same_settings(_settings(job, self), plan["settings"])
            worker = _Worker(job, self, world, store, parts, client, device)
            opened.callback(worker.stage.close)
            client.wait_started()
            if hub is not None:
                roll_call.release()
            setup = time.perf_counter() - began
            with occupy_cores(worker.cores):
                payload = worker.run()
            payload["setup_seconds"] = setup
            client.finish(payload)
        result = hub.collect(parts, plan["costs"], client) if hub else _own_result(job, names, worker, payload)
        client.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        if hub is None and presence is not None:
            presence.close()
        return result


class _Worker:
    """This rank's stage with its edges."""

    def __init__(
        self,
        job: Job,
        options: Processes,
        world: World,
        store: dist.Store,
        parts: list[range],
        client: CoordinatorClient,
        device: torch.device,
    ) -> None:
        self.job, self.client, self.device, self.index = job, client, device, world.rank
        self.num_stages = world.size
        # On a CPU the other stages leave cores idle, if only between two of their actions.
        read_ahead = _READ_AHEAD if world.size > 1 else None
        self.stage: Stage = job.stage(world.rank, parts[world.rank], device, prefetch=read_ahead)
        self.cores = own_cores(world.local_rank, world.local_size) if options.pin and device.type == "cpu" else []
        if job.resume is not None:
            load_layers(job.resume, self.stage.layers)
        self.stopwatch = Stopwatch(keep=job.settings.trace is not None)
        self.reporter = StageReporter(
            self.stage,
            job.plan,
            self.stopwatch,
            client,
            # The coordinator knows the test losses, and sets the rate with the window that the epoch begins in.
            lr_factor=(lambda _: client.lr_factor) if job.lr_factor.needs_losses else job.lr_factor,
            waits_for_losses=job.lr_factor.needs_losses,
            print_freq=job.settings.print_freq,
            start=job.start,
            rank=world.rank,
            best_dir=job.settings.best_dir,
            queue_fill=lambda: getattr(self.loop.inbox, "fill", 0.0),
        )
        rows = job.plan.max_rows
        timeout = job.settings.timeout

        def layout(first_layer: int) -> SlotLayout:
            return SlotLayout(rows, job.network.output_shapes[first_layer - 1], job.storage)

        # Building a stage takes as long as it takes; the neighbours' time limit is for the run.
        meet(store, world, "stage-built", options.start_timeout)
        index, last = world.rank, world.size - 1
        inbox, outbox = link_stages(
            store,
            world,
            layout(parts[index].start) if index > 0 else None,
            layout(parts[index].stop) if index < last else None,
            transport=options.transport,
            depth=options.queue_depth,
            device=device,
            timeout=timeout,
            names=[stage_name(i, i, [job.network.names[j] for j in part]) for i, part in enumerate(parts)],
        )
        self.outbox = outbox
        self.position = job.start
        self.loop = StageLoop(
            self.stage,
            rank=world.rank,
            inbox=inbox,
            outbox=outbox,
            snapshot=self._snapshot,
            before_item=self.reporter.before,
            after_item=self._after,
            stopwatch=self.stopwatch,
        )

    def run(self) -> dict[str, Any]:
        """Works through all windows; the stage's final payload."""
        self.stopwatch.restart()
        began = time.perf_counter()
        for window in self.client.windows(self.job.settings.timeout):
            items = list(self.job.plan.items(window.start, window.stop))
            self.loop.run(items, stage_actions(self.index, self.num_stages, items))
        self.stage.close()
        if self.outbox is not None:
            self.outbox.flush()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.reporter.poll(wait=True)
        seconds = time.perf_counter() - began
        for layer in self.stage.layers:
            layer.set_mode("evaluate")  # a schedule-free optimizer leaves its evaluation weights behind
        return {
            "weights": pack_tensors(pair for layer in self.stage.layers for pair in layer.tensors()),
            "train_seconds": seconds,
            "images": self.reporter.images,
            "position": self.position,
            "busy": self.stopwatch.busy / max(seconds, 1e-9),
            "step_seconds": self.stopwatch.seconds_per_step(),
            "peak_memory": peak_memory_bytes(self.device),
            "spans": [(one.label, one.start_us, one.end_us) for one in self.stopwatch.timed],
        }

    def _after(self, item: Item) -> None:
        self.position = item.position + 1
        self.reporter.after(item)

    def _snapshot(self, item: Item) -> None:
        root = self.job.settings.snapshot_dir
        assert root is not None, "a plan with snapshots needs a folder"
        save_layers(snapshot_folder(root, steps_before(self.job.plan, item.position)), self.stage.layers)
        self.client.snapshot_done(item.position)


class _Hub:
    """Rank 0's extra duties: partition, coordinator, the whole run's result."""

    def __init__(self, job: Job, options: Processes, world: World, make_sinks: SinkMaker, num_stages: int) -> None:
        self._job, self._options, self._world, self._num_stages = job, options, world, num_stages
        self._make_sinks = make_sinks
        self._own_sinks: Sequence[MetricsSink] = ()
        self._coordinator: Coordinator | None = None
        self._lost: str | None = None

    def publish(self, device: torch.device) -> dict[str, Any]:
        """Decides who owns what and opens the coordinator; what every rank must know."""
        job, options = self._job, self._options
        costs = job.costs(device) if self._num_stages > 1 else [1.0] * len(job.network.blocks)
        stages = options.stages if isinstance(options.stages, str) else self._num_stages
        parts = job.partition(costs, stages)
        self._own_sinks = self._make_sinks()
        self._sinks = FanOut(self._own_sinks)
        local = self._world.is_local
        coordinator = Coordinator(
            [[job.network.names[i] for i in part] for part in parts],
            len(job.plan),
            first=job.start,
            queue_depth=options.queue_depth,
            host="127.0.0.1" if local else "0.0.0.0",
            advertise=None if local else self._world.master_address,
            port=options.coordinator_port,
            gate=_gate(job),
            sink=self._sinks,
            on_snapshot=self._complete_snapshot,
            start_timeout=options.start_timeout,
            heartbeat_timeout=_heartbeat_timeout(job),
        )
        self._sinks.on_start(job.run_info(parts))  # after every mistake that can be found before: it writes files
        coordinator.start()
        self._coordinator = coordinator
        if self._lost is not None:
            raise RunFailed(self._lost)
        return {
            "parts": [(part.start, part.stop) for part in parts],
            "address": coordinator.address,
            "costs": [sum(costs[i] for i in part) for part in parts],
            "settings": _settings(job, options),
        }

    def lose(self, rank: int) -> None:
        """A process has ended during its set-up. From any thread."""
        self._lost = f"{stage_name(rank)} is lost: its process ended during set-up"
        if self._coordinator is not None:  # else `publish` looks when it has one
            self._coordinator.abort(self._lost)

    def close_sinks(self, message: str) -> None:
        """Tells the sinks of the failure before the process ends: a live dashboard hides the cursor, for one.

        One that hangs keeps the process no longer than a few seconds.
        """
        sinks = FanOut(self._own_sinks)
        ending = threading.Thread(target=sinks.__exit__, args=(RunFailed, RunFailed(message), None), daemon=True)
        ending.start()
        ending.join(_SINKS_SECONDS)

    def collect(self, parts: list[range], predicted: list[float], client: CoordinatorClient) -> RunResult:
        assert self._coordinator is not None
        payloads = self._coordinator.results()
        self._coordinator.close()
        stages = [payloads[i] for i in range(len(parts))]
        weights = {k: v for payload in stages for k, v in unpack_tensors(payload["weights"]).items()}
        seconds = max(payload["train_seconds"] for payload in stages)
        job = self._job
        names = [[job.network.names[i] for i in part] for part in parts]
        if job.settings.trace is not None:
            spans = [TimedAction(i, *span) for i, payload in enumerate(stages) for span in payload["spans"]]
            rows = {i: f"stage {i}: {', '.join(layers)}" for i, layers in enumerate(names)}
            write_chrome_trace(job.settings.trace, spans, rows)
        return RunResult(
            engine=job.engine,
            stages=names,
            epochs=self._coordinator.epochs,
            steps=steps_before(job.plan, stages[0]["position"]),
            train_seconds=seconds,
            setup_seconds=stages[0]["setup_seconds"],
            images_per_second=stages[0]["images"] / max(seconds, 1e-9),
            weights=weights,
            weights_sha256=weights_digest(weights.items()),
            peak_memory_bytes=[payload["peak_memory"] for payload in stages],
            busy_fraction=[payload["busy"] for payload in stages],
            stopped_by=client.stopped.signal if client.stopped else None,
            predicted_stage_seconds=predicted if len(parts) > 1 else [],
            measured_stage_seconds=[payload["step_seconds"] for payload in stages],
        )

    def _complete_snapshot(self, position: int) -> None:
        job = self._job
        assert job.settings.snapshot_dir is not None
        steps = steps_before(job.plan, position)
        losses = job.lr_factor.losses_before(job.plan[position].epoch)
        write_manifest(
            job.settings.snapshot_dir,
            position=position + 1,
            steps=steps,
            settings=job.fingerprint,
            test_losses=losses,
        )


def _gate(job: Job) -> EpochGate | None:
    if not job.lr_factor.needs_losses:
        return None
    ends = [job.plan.end_of_epoch(epoch) for epoch in range(job.plan.num_epochs)]
    return EpochGate(job.lr_factor, ends, job.plan[job.start].epoch)


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


def _settings(job: Job, options: Processes) -> dict[str, Any]:
    """What must be the same on all ranks, as JSON gives it back."""
    settings = {
        **job.fingerprint,
        **job.rates,
        "length of the stream": len(job.plan),
        "first position": job.start,
        "queue_depth": options.queue_depth,
        "transport": options.transport,
        "device": job.device.type,
    }
    return dict(json.loads(json.dumps(settings)))


def _check_same_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    wrong = [
        f"{name} is {value!r} here and {theirs.get(name)!r} in rank 0"
        for name, value in mine.items()
        if value != theirs.get(name)
    ]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; start all ranks with the same flags")


def _heartbeat_timeout(job: Job) -> float:
    """Whoever is given less time to answer a neighbour has no more to give a sign of life."""
    return min(_HEARTBEAT_SECONDS, job.settings.timeout)


def _device(job: Job, world: World) -> torch.device:
    device = job.device
    if device.type == "cuda" and device.index is None:
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {world.local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} "
                "found); start one process per GPU, or use --engine streams on one GPU"
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
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


def _abort(message: str, rank: int, first_layers: Sequence[str], hub: "_Hub | None") -> None:
    """Ends this process at once: its main thread may be waiting inside native code."""
    if hub is not None:
        hub.close_sinks(message)
    lost = message.startswith("the coordinator")
    if lost:
        message = f"{stage_name(0, 0, first_layers)} is lost: {message}"
    if lost or rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _own_result(job: Job, names: list[list[str]], worker: _Worker, payload: Mapping[str, Any]) -> RunResult:
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
