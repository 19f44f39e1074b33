"""What engines do at a snapshot mark: stages are saved beside the stream, and what is whole is declared complete."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from unlocked.runtime.engines.one_process import saves_stop, threads_of
from unlocked.runtime.job import Job
from unlocked.runtime.saving.layer_files import LayerFile
from unlocked.runtime.saving.snapshots import prune_snapshots, set_aside, snapshot_folder, write_manifest
from unlocked.runtime.saving.writer import SnapshotWriter
from unlocked.runtime.schedules.marks import TimedMarks
from unlocked.workers.actions import Item
from unlocked.workers.stage import Stage

__all__ = ["RunSaver", "StageSaver", "complete_snapshot", "set_others_aside", "timed_marks"]


class StageSaver:
    """Saves stages of this process. Close it in any case: it has a thread.

    Args:
        saved: is called in that thread with a position and the files of a stage's part of its snapshot.
    """

    def __init__(self, job: Job, saved: Callable[[int, Mapping[str, LayerFile]], None], *, rank: int = 0) -> None:
        self._job, self._saved = job, saved
        self._begun: dict[int, int] = {}  # stage -> the position of its latest part
        self._writer = SnapshotWriter(job.run, rank=rank, timeout=job.settings.timeout)
        self.check, self.finish, self.close = self._writer.check, self._writer.finish, self._writer.close

    def save(self, stage: Stage, position: int) -> None:
        """The stage's part of the snapshot from which a run goes on at `position`; see `SnapshotWriter.save`."""
        for layer in stage.layers:
            layer.set_mode("train")  # as the next micro-batch would; an evaluation may come before
        epoch = self._job.plan[position - 1].epoch
        self._begun[stage.index] = position
        self._writer.save(stage, _folder(self._job, position), position, partial(self._saved, position), epoch=epoch)

    def mark(self, stage: Stage, item: Item) -> None:
        """Action SNAP."""
        self.save(stage, item.position + 1)

    def save_stopped(self, stages: Sequence[Stage], position: int, *, counted: int = 0) -> None:
        """The snapshot of an orderly stop before `position`, if it leaves one. Of a mark's that is there already every
        part is written, or about to be: to write it again would un-complete it, and nobody would complete it anew.

        Args:
            counted: the position of the stages' latest part that has been counted, by whichever worker it was saved.
        """
        if saves_stop(self._job, position):
            for stage in stages:
                if position > max(counted, self._begun.get(stage.index, 0)):
                    self.save(stage, position)


class RunSaver(StageSaver):
    """Saves all stages of a run, which are in this process: the last part completes a snapshot."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, self._add)
        self._parts: dict[int, dict[str, LayerFile]] = {}
        self._threads = threads_of(job)  # of this thread: another one may tell another number
        self.marks = timed_marks(job)

    def _add(self, position: int, files: Mapping[str, LayerFile]) -> None:
        parts = self._parts.setdefault(position, {})
        parts.update(files)
        if len(parts) == len(self._job.network.names):
            del self._parts[position]
            complete_snapshot(self._job, position, self._threads, parts)
            self.marks.complete(position)


def set_others_aside(job: Job) -> None:
    """Leaves the folder of snapshots to those that the run goes on from, and says where the others are.

    Where the run reports, and there alone: once every stage is built, as what the run is resumed from is whole then,
    and before any trains.
    """
    root = job.settings.snapshot_dir
    text = None if root is None else set_aside(root, job.resume)
    if text is not None:
        print(text, file=sys.stderr, flush=True)


def timed_marks(job: Job) -> TimedMarks:
    """Those that come by the clock, from now on."""
    return TimedMarks(job.plan, job.settings.snapshot_period.seconds, time.monotonic())


def complete_snapshot(
    job: Job, position: int, threads: Mapping[str, int], files: Mapping[str, LayerFile | tuple[int, str]]
) -> None:
    """All stages have saved theirs: it counts from here on, and older ones may go.

    Args:
        threads: each layer's number of intra-op threads.
        files: each layer's.
    """
    root = job.settings.snapshot_dir
    assert root is not None, "a plan with snapshots needs a folder"
    epoch = job.plan[min(position, len(job.plan) - 1)].epoch
    write_manifest(
        _folder(job, position),
        run=job.run,
        position=position,
        steps=job.plan.steps_before(position),
        settings=job.fingerprint,
        files={name: LayerFile(*files[name]) for name in job.network.names},
        test_losses=job.lr_factor.losses_before(epoch),
        threads=threads,
        generators=job.generators,
    )
    if job.settings.kept_snapshots is not None:
        prune_snapshots(root, job.settings.kept_snapshots)


def _folder(job: Job, position: int) -> Path:
    root = job.settings.snapshot_dir
    assert root is not None, "a plan with snapshots needs a folder"
    evaluated = job.plan[position - 1].kind != "train"
    return snapshot_folder(root, job.plan.steps_before(position), evaluated=evaluated)
