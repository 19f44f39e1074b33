"""One worker process per stage, under torchrun or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

Activations go point to point between neighbours, in one direction only; control goes through the coordinator in rank
0's process. The micro-batches in flight at a stop or at the end of a run are always none: every stage completes the
same window of the stream.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from unlocked.runtime.client import CoordinatorClient
from unlocked.runtime.coordinator import Coordinator
from unlocked.runtime.engines.links import link_stages
from unlocked.runtime.engines.local import steps_before
from unlocked.runtime.engines.rendezvous import World, connect, exchange
from unlocked.runtime.job import Job, SinkMaker, peak_memory_bytes
from unlocked.runtime.messages import stage_name
from unlocked.runtime.metrics import EpochResult, FanOut, MetricsSink
from unlocked.runtime.reporter import StageReporter
from unlocked.runtime.result import RunResult, pack_tensors, unpack_tensors, weights_digest
from unlocked.runtime.schedule import stage_actions
from unlocked.runtime.signals import StopSignals
from unlocked.runtime.snapshots import load_layers, save_layers, snapshot_folder, write_manifest
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.errors import LinkLostError, StageError
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.trace import Recorder, Span, write_chrome_trace

__all__ = ["ProcessesEngine"]


class ProcessesEngine:
    """Runs this process's stage; rank 0 also runs the coordinator and returns the whole result."""

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        world = World.from_environment()
        num_stages = _number_of_stages(job, world)
        began = time.perf_counter()
        device = _device(job, world)
        store = connect(world, job.settings.start_timeout)
        hub = _Hub(job, world, make_sinks, num_stages, device) if world.rank == 0 else None
        plan = exchange(store, world, "plan", hub.publish if hub else None, job.settings.start_timeout)
        parts = [range(start, stop) for start, stop in plan["parts"]]
        names = [[job.network.names[i] for i in part] for part in parts]
        client = CoordinatorClient(
            plan["address"],
            stage=world.rank,
            rank=world.rank,
            layers=names[world.rank],
            on_abort=lambda message: _abort(message, world.rank, names[0], hub),
            start_timeout=job.settings.start_timeout,
        )
        client.open()
        # From here on a signal asks for an orderly stop, also one that a launcher sends because another worker died:
        # this worker must live to say why.
        with StopSignals(client.request_stop), _telling(client, world, names[world.rank]):
            worker = _Worker(job, world, store, parts, client, device)
            client.wait_started()
            setup = time.perf_counter() - began
            payload = worker.run()
            payload["setup_seconds"] = setup
            client.finish(payload)
        result = hub.collect(parts, plan["costs"], client) if hub else _own_result(job, names, worker, payload)
        client.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        return result


class _Worker:
    """This rank's stage with its edges."""

    def __init__(
        self,
        job: Job,
        world: World,
        store: dist.Store,
        parts: list[range],
        client: CoordinatorClient,
        device: torch.device,
    ) -> None:
        self.job, self.client, self.device, self.index = job, client, device, world.rank
        self.num_stages = world.size
        self.stage: Stage = job.stage(world.rank, parts[world.rank], device)
        if job.settings.resume is not None:
            load_layers(job.settings.resume, self.stage.layers)
        self.recorder = Recorder(keep=job.settings.trace is not None)
        self.reporter = StageReporter(
            self.stage,
            job.plan,
            self.recorder,
            client,
            lr_factor=job.lr_factor,
            print_freq=job.settings.print_freq,
            start=job.start,
            rank=world.rank,
            best_dir=job.settings.best_dir,
            queue_fill=lambda: getattr(self.loop.inbox, "fill", 0.0),
        )
        rows = max(min(job.plan.batch_size, job.plan.train_size), min(job.plan.eval_batch_size, job.plan.eval_size))
        timeout = job.settings.timeout

        def layout(first_layer: int) -> SlotLayout:
            return SlotLayout(rows, job.network.output_shapes[first_layer - 1])

        index, last = world.rank, world.size - 1
        inbox, outbox = link_stages(
            store,
            world,
            layout(parts[index].start) if index > 0 else None,
            layout(parts[index].stop) if index < last else None,
            transport=job.settings.transport,
            depth=job.settings.queue_depth,
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
            recorder=self.recorder,
        )

    def run(self) -> dict[str, Any]:
        """Works through all windows; the stage's final payload."""
        self.recorder.restart()
        began = time.perf_counter()
        for window in self.client.windows(self.job.settings.timeout):
            items = list(self.job.plan.items(window.start, window.stop))
            self.loop.run(items, stage_actions(self.index, self.num_stages, items))
        if self.outbox is not None:
            self.outbox.flush()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - began
        for layer in self.stage.layers:
            layer.set_mode("evaluate")  # a schedule-free optimizer leaves its evaluation weights behind
        return {
            "weights": pack_tensors(pair for layer in self.stage.layers for pair in layer.tensors()),
            "train_seconds": seconds,
            "images": self.reporter.images,
            "position": self.position,
            "busy": self.recorder.busy / max(seconds, 1e-9),
            "busy_seconds": self.recorder.busy,
            "items": self.position - self.job.start,
            "peak_memory": peak_memory_bytes(self.device),
            "spans": [(span.label, span.start_us, span.end_us) for span in self.recorder.spans],
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

    def __init__(self, job: Job, world: World, make_sinks: SinkMaker, num_stages: int, device: torch.device) -> None:
        self._job, self._world, self._num_stages, self._device = job, world, num_stages, device
        self.epochs = _EpochKeeper()
        self._make_sinks = make_sinks
        self._own_sinks: Sequence[MetricsSink] = ()
        self._coordinator: Coordinator | None = None

    def publish(self) -> dict[str, Any]:
        """Decides who owns what and opens the coordinator; what every rank must know."""
        job = self._job
        costs = job.costs(self._device) if self._num_stages > 1 else [1.0] * len(job.network.blocks)
        parts = job.partition(costs, self._num_stages)
        self._own_sinks = self._make_sinks()
        self._sinks = FanOut([self.epochs, *self._own_sinks])
        self._sinks.on_start(job.run_info(parts))
        local = self._world.is_local
        self._coordinator = Coordinator(
            [[job.network.names[i] for i in part] for part in parts],
            len(job.plan),
            first=job.start,
            queue_depth=job.settings.queue_depth,
            host="127.0.0.1" if local else "0.0.0.0",
            advertise=None if local else self._world.master_address,
            port=job.settings.coordinator_port,
            sink=self._sinks,
            on_snapshot=self._complete_snapshot,
            start_timeout=job.settings.start_timeout,
        )
        self._coordinator.start()
        return {
            "parts": [(part.start, part.stop) for part in parts],
            "address": self._coordinator.address,
            "costs": [sum(costs[i] for i in part) for part in parts],
        }

    def close_sinks(self) -> None:
        """Gives the terminal back before the process ends: a live dashboard hides the cursor."""
        for sink in self._own_sinks:
            close = getattr(sink, "close", None)
            if close is not None:
                close()

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
            spans = [Span(i, *span) for i, payload in enumerate(stages) for span in payload["spans"]]
            rows = {i: f"stage {i}: {', '.join(layers)}" for i, layers in enumerate(names)}
            write_chrome_trace(job.settings.trace, spans, rows)
        return RunResult(
            engine=job.settings.engine,
            stages=names,
            epochs=self.epochs.results,
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
            measured_stage_seconds=[payload["busy_seconds"] / max(payload["items"], 1) for payload in stages],
        )

    def _complete_snapshot(self, position: int) -> None:
        job = self._job
        assert job.settings.snapshot_dir is not None
        steps = steps_before(job.plan, position)
        write_manifest(job.settings.snapshot_dir, position=position + 1, steps=steps, settings=job.fingerprint)


class _EpochKeeper:
    """Keeps the epochs' results for the run's result."""

    def __init__(self) -> None:
        self.results: list[EpochResult] = []

    def on_epoch(self, result: EpochResult) -> None:
        self.results.append(result)

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        if name.startswith("on_"):
            return lambda record: None
        raise AttributeError(name)


def _number_of_stages(job: Job, world: World) -> int:
    layers, stages = len(job.network.blocks), job.settings.stages
    if isinstance(stages, str):
        stages = len(job.partition([1.0] * layers, 1))
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
        hub.close_sinks()
    lost = message.startswith("the coordinator")
    if lost:
        message = f"{stage_name(0, 0, first_layers)} is lost: {message}"
    if lost or rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def _own_result(job: Job, names: list[list[str]], worker: _Worker, payload: Mapping[str, Any]) -> RunResult:
    """What a rank other than 0 knows: its own stage."""
    return RunResult(
        engine=job.settings.engine,
        stages=names,
        steps=steps_before(job.plan, worker.position),
        train_seconds=payload["train_seconds"],
        setup_seconds=payload["setup_seconds"],
        weights=unpack_tensors(payload["weights"]),
        stopped_by=worker.client.stopped.signal if worker.client.stopped else None,
    )
