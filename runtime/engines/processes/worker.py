"""One rank's stage with its edges, and its way through the windows of the stream."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.one_process import save_stage, saves_stop
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.engines.processes.options import ProcessesOptions
from unlocked.runtime.engines.processes.stage_saver import StageSaver
from unlocked.runtime.faults import faults_from_environment, trigger
from unlocked.runtime.job import Job
from unlocked.runtime.machine import own_cores, peak_memory_bytes, threads_on
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.result import pack_tensors
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.workers.actions import Item
from unlocked.workers.edges import OutEdge
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Worker"]

_READ_AHEAD = 2  # micro-batches of resident data that a thread assembles for stage 0


class Worker:
    """This rank's stage.

    Args:
        parts: the layers of each stage.
        memory: where the stage saves itself, and goes on from if a worker before this one has; None: nobody takes over.
        incarnation: which of the stage's workers this is; 0 is the first.
    """

    def __init__(
        self,
        job: Job,
        options: ProcessesOptions,
        world: World,
        parts: Sequence[range],
        client: CoordinatorClient,
        device: torch.device,
        memory: MemorySnapshot | None = None,
        incarnation: int = 0,
    ) -> None:
        self.job, self.client, self.device, self.index = job, client, device, world.rank
        self.num_stages = world.size
        state = memory.read() if memory is not None else None
        self.position: int = job.start if state is None else state["position"]
        # On a CPU the other stages leave cores idle, if only between two of their actions.
        read_ahead = _READ_AHEAD if world.size > 1 else None
        self.stage: Stage = job.stage(world.rank, parts[world.rank], device, prefetch=read_ahead, start=self.position)
        self.cores = own_cores(world.local_rank, world.local_size) if options.pin and device.type == "cpu" else []
        self.threads = threads_on(self.cores)
        """Of this stage's process, once it runs."""
        if job.resume is not None and state is None:
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
        self._incarnation, self._state = incarnation, state
        self._began_at = self._again = 0  # where this worker took over, and the items that it does again
        self._memory, self._saver = memory, None if memory is None else StageSaver(memory, job, self.stage)

    def connect(self, inbox: Any, outbox: Any) -> None:
        """Gives the stage its edges, which keep a log if it is to save itself; None at the ends of the pipeline."""
        self.outbox: OutEdge | None = outbox
        self.loop = StageLoop(
            self.stage,
            rank=self.index,
            inbox=inbox,
            outbox=outbox,
            snapshot=self._snapshot,
            before_item=self.reporter.before,
            after_item=self._after,
            stopwatch=self.stopwatch,
            before_action=trigger(faults_from_environment(), self.index, self._incarnation),
        )
        if self._saver is not None:
            self._saver.connect(self.reporter, self.stopwatch, inbox, outbox)

    def run(self) -> dict[str, Any]:
        """Works through all windows; the stage's final payload."""
        self.stopwatch.restart()
        began = time.perf_counter()
        if self._saver is not None and self._incarnation:
            began -= self._saver.take_over(self._state)
            self._state = None
            self._come_back()
        for window in self.client.windows(self.job.settings.timeout, self.position):
            items = list(self.job.plan.items(window.start, window.stop))
            self.loop.run(items, stage_actions(self.index, self.num_stages, items))
        self.stage.close()
        if self._saver is not None:
            self._saver.save(self.position)  # what came in is not asked for again
        if self.outbox is not None:
            self.outbox.flush()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.reporter.poll(wait=True)
        seconds = time.perf_counter() - began
        self.reporter.check_weights(self.position)
        if self.client.stopped and saves_stop(self.job, self.position):
            self._save(self.position)
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

    def _come_back(self) -> None:
        """Tells of it where there is nothing to do again."""
        assert self._saver is not None
        self._again = max(self._saver.reached - self.position, 0)
        self._began_at = self.position
        self.reporter.done_before = self._saver.reached
        if not self._again:
            self.client.replayed(self._began_at, 0)

    def _after(self, item: Item) -> None:
        self.position = item.position + 1
        self.reporter.after(item)
        if self._saver is not None:
            if self._again and self.position == self._began_at + self._again:
                self.client.replayed(self._began_at, self._again)
            self._saver.after(item)

    def _snapshot(self, item: Item) -> None:
        self._save(item.position + 1)

    def _save(self, position: int) -> None:
        """This stage's part of the snapshot from which a run goes on at `position`."""
        if self._memory is None or self._memory.saved < position:
            save_stage(self.job, self.stage, position)
            if self._memory is not None:
                self._memory.saved = position
        self.client.snapshot_done(position)
