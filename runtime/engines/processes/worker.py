"""One rank's stage with its edges, and its way through the windows of the stream."""

import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import stage_name
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.one_process import saves_stop
from unlocked.runtime.engines.processes.links import link_stages
from unlocked.runtime.engines.processes.options import ProcessesOptions
from unlocked.runtime.engines.processes.rendezvous import meet
from unlocked.runtime.engines.saver import StageSaver
from unlocked.runtime.faults import faults_from_environment, trigger
from unlocked.runtime.job import Job
from unlocked.runtime.machine import own_cores, peak_memory_bytes, threads_on
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.tensors import pack_tensors
from unlocked.workers.actions import Item
from unlocked.workers.cargo import CargoLayout
from unlocked.workers.edges import SlotLayout
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Worker"]

_READ_AHEAD = 2  # micro-batches of resident data that a thread assembles for stage 0


class Worker:
    """This rank's stage with its edges."""

    def __init__(
        self,
        job: Job,
        options: ProcessesOptions,
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
        self.saver = StageSaver(job, client.snapshot_done, rank=world.rank)
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
        if job.lr_factor.per_step:
            self.reporter.set_rates_per_step(job.lr_factor.at)
        rows = job.plan.max_rows
        timeout = job.settings.timeout

        def layout(first_layer: int) -> SlotLayout:
            shape = job.network.output_shapes[first_layer - 1]
            traffic = job.network.side_channel.traffic(first_layer - 1)
            return CargoLayout(rows, shape, job.storage, traffic) if traffic else SlotLayout(rows, shape, job.storage)

        store.set(f"threads-{world.rank}", str(threads_on(self.cores)))
        # Building a stage takes as long as it takes; the neighbours' time limit is for the run.
        meet(store, world, "stage-built", options.start_timeout)
        self.threads = [int(store.get(f"threads-{rank}")) for rank in range(world.size)]
        """Of every stage's process."""
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
            snapshot=partial(self.saver.mark, self.stage),
            before_item=self.reporter.before,
            after_item=self._after,
            stopwatch=self.stopwatch,
            before_action=trigger(faults_from_environment(), self.index, incarnation=0),
        )

    def close(self) -> None:
        """Lets go of the data and of the thread that writes snapshots. Idempotent."""
        self.stage.close()
        self.saver.close()

    def run(self) -> dict[str, Any]:
        """Works through all windows; the stage's final payload."""
        self.stopwatch.restart()
        began = time.perf_counter()
        for window in self.client.windows(self.job.settings.timeout):
            items = list(self.job.plan.items(window.start, window.stop, self.client.marks))
            self.loop.run(items, stage_actions(self.index, self.num_stages, items))
        self.stage.close()
        if self.outbox is not None:
            self.outbox.flush()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.reporter.poll(wait=True)
        seconds = time.perf_counter() - began
        self.reporter.check_weights(self.position)
        if self.client.stopped and saves_stop(self.job, self.position):
            self.saver.save(self.stage, self.position)
        self.saver.finish()
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
        self.saver.check()
