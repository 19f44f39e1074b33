"""One rank's stage with its edges, and its way through the windows of the stream."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.messages import Replayed
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.memory_saver import MemorySaver
from unlocked.runtime.engines.processes.memory_snapshot import MemorySnapshot
from unlocked.runtime.engines.processes.options import ProcessesOptions
from unlocked.runtime.engines.saver import StageSaver
from unlocked.runtime.faults import faults_from_environment, trigger
from unlocked.runtime.job import Job
from unlocked.runtime.machine import own_cores, peak_memory_bytes, threads_on
from unlocked.runtime.metrics.reporter import StageReporter
from unlocked.runtime.metrics.step_rates import set_rates_per_step
from unlocked.runtime.saving.snapshots import load_layers
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.tensors import pack_tensors
from unlocked.workers.actions import Item
from unlocked.workers.edges import OutEdge
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Worker", "figures"]

_READ_AHEAD = 2  # micro-batches of resident data that a thread assembles for stage 0


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the coordinator is told of a stage's final payload: all but the weights, which go another way."""
    return {name: value for name, value in payload.items() if name != "weights"}


class Worker:
    """This rank's stage.

    Args:
        parts: the layers of each stage.
        waits: rank 0 has a metrics sink that is to hear of every epoch before the next one begins.
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
        *,
        waits: bool,
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
        self.saver = StageSaver(job, client.snapshot_done, rank=world.rank)
        self.stopwatch = Stopwatch(keep=job.settings.trace is not None)
        self.reporter = StageReporter(
            self.stage,
            job.plan,
            self.stopwatch,
            client,
            # The coordinator knows the test losses, and sets the rate with the window that the epoch begins in.
            lr_factor=(lambda _: client.lr_factor) if job.lr_factor.needs_losses else job.lr_factor,
            waits_for_losses=job.lr_factor.needs_losses or waits,
            print_freq=job.settings.print_freq,
            start=job.start,
            rank=world.rank,
            best_dir=job.settings.best_dir,
            sizes=job.network.sums,
            queue_fill=lambda: getattr(self.loop.inbox, "fill", 0.0),
        )
        if job.lr_factor.per_step:
            set_rates_per_step(self.reporter, self.stage, job.plan, job.lr_factor.at)
        self._incarnation, self._state = incarnation, state
        self._began_at = self._again = 0  # where this worker took over, and the items that it does again
        self._memory = None if memory is None else MemorySaver(memory, job, self.stage, self._settle)
        self._marked: set[int] = set()  # micro-batches of the window that a snapshot mark follows
        self._marked_at = 0  # the position of the latest snapshot that this stage has begun to write

    def connect(self, inbox: Any, outbox: Any) -> None:
        """Gives the stage its edges, which keep a log if it is to save itself; None at the ends of the pipeline."""
        self.outbox: OutEdge | None = outbox
        for log in filter(None, (getattr(edge, "log", None) for edge in (inbox, outbox))):
            log.map_in()  # a forked process inherits shared memory, but not the map to it
        self.loop = StageLoop(
            self.stage,
            rank=self.index,
            inbox=inbox,
            outbox=outbox,
            snapshot=self._mark,
            before_item=self.reporter.before,
            after_item=self._after,
            stopwatch=self.stopwatch,
            before_action=trigger(faults_from_environment(), self.index, self._incarnation),
        )
        if self._memory is not None:
            self._memory.connect(self.reporter, self.stopwatch, inbox, outbox)

    def close(self) -> None:
        """Lets go of the data and of the thread that writes snapshots. Idempotent."""
        self.stage.close()
        self.saver.close()

    def run(self) -> dict[str, Any]:
        """Works through all windows; the stage's final payload."""
        self.stopwatch.restart()
        began = time.perf_counter()
        if self._memory is not None and self._incarnation:
            began -= self._memory.take_over(self._state)
            self._state = None
            self._come_back()
        for window in self.client.windows(self.job.settings.timeout, self.position):
            items = list(self.job.plan.items(window.start, window.stop, self.client.marks))
            self._marked = {item.position for item in items if item.kind == "snapshot"}
            self.loop.run(items, stage_actions(self.index, self.num_stages, items))
        self.stage.close()
        if self._memory is not None:
            self._settle(wait=True)
            self._memory.save(self.position)  # what came in is not asked for again
        if self.outbox is not None:
            self.outbox.flush()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.reporter.poll(wait=True)
        seconds = time.perf_counter() - began
        self.reporter.check_weights(self.position)
        if self.client.stopped:
            self.saver.save_stopped([self.stage], self.position, counted=self.client.saved)
        self.saver.finish()
        for layer in self.stage.layers:
            layer.set_mode("evaluate")  # a schedule-free optimizer leaves its evaluation weights behind
        ahead = 1e6 * self.client.clock_ahead  # a trace has the clock of rank 0's machine
        return {
            "weights": pack_tensors(pair for layer in self.stage.layers for pair in layer.tensors()),
            "train_seconds": seconds,
            "images": self.reporter.images,
            "position": self.position,
            "busy": self.stopwatch.busy / max(seconds, 1e-9),
            "step_seconds": self.stopwatch.seconds_per_step(),
            "peak_memory": peak_memory_bytes(self.device),
            "spans": [(one.label, one.start_us - ahead, one.end_us - ahead) for one in self.stopwatch.timed],
        }

    def _come_back(self) -> None:
        """Tells of it where there is nothing to do again."""
        assert self._memory is not None
        self._again = max(self._memory.reached - self.position, 0)
        self._began_at = self.position
        self.reporter.done_before = self._memory.reached
        if not self._again:
            self._tell_of_replay()

    def _tell_of_replay(self) -> None:
        """This worker has come to where the one before it was."""
        said = Replayed(incarnation=self._incarnation, position=self._began_at, replayed=self._again)
        self.client.tell(said)

    def _after(self, item: Item) -> None:
        self.position = item.position + 1
        self.reporter.after(item)
        self.saver.check()
        # A mark belongs to the micro-batch before it: who goes on from here must not miss it.
        if self._memory is not None and (item.kind == "snapshot" or item.position not in self._marked):
            if self._again and self.position == self._began_at + self._again:
                self._tell_of_replay()
            self._memory.after(item)

    def _mark(self, item: Item) -> None:
        """Action SNAP. A stage that does a dead worker's work again has no part to give that has been counted."""
        if item.position >= self.client.saved:
            self._marked_at = item.position + 1
            self.saver.mark(self.stage, item)

    def _settle(self, wait: bool) -> bool:
        """Whether all parts of snapshots that this stage owes have been counted; with `wait`, after a while."""
        if wait and self.client.saved < self._marked_at:
            self.saver.finish()
            self.client.await_news(lambda: self.client.saved >= self._marked_at, self.job.settings.timeout)
        return self.client.saved >= self._marked_at
