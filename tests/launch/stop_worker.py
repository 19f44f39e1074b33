"""One rank of a run that saves itself behind every micro-batch, and that its sink stops: always behind a mark, then.

python stop_worker.py FOLDER again|dies

again: whoever saves a position a second time waits until its snapshot is complete, as a stage with large weights would
come to it later. dies: stage 1's first worker dies once the snapshot of the stop is complete, and before its own end.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import MetricsSink, Trainer
from unlocked.runtime.engines.processes.worker import Worker
from unlocked.runtime.engines.saver import StageSaver
from unlocked.runtime.metrics.records import StepResult
from unlocked.runtime.saving.snapshots import find_snapshot
from unlocked.workers.stage import Stage

FOLDER, WHAT = Path(sys.argv[1]), sys.argv[2]
LIMIT = 60.0


def await_snapshot(position: int) -> None:
    deadline = time.monotonic() + LIMIT
    while True:
        try:
            if find_snapshot(FOLDER).position == position:
                return
        except ValueError:
            pass  # there is none yet
        assert time.monotonic() < deadline, f"the snapshot of {position} was never complete"
        time.sleep(0.005)


saves, works = StageSaver.save, Worker.run
latest: dict[int, int] = {}


def save(self: StageSaver, stage: Stage, position: int) -> None:
    if latest.get(stage.index) == position:
        self.finish()
        await_snapshot(position)
    latest[stage.index] = position
    saves(self, stage, position)


def run(self: Worker) -> dict[str, Any]:
    payload = works(self)
    if self.index == 1 and self._incarnation == 0:
        await_snapshot(self.position)
        os.kill(os.getpid(), signal.SIGKILL)
    return payload


class Stop(MetricsSink):
    def on_step(self, step: StepResult) -> None:
        self.stop("enough")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if WHAT == "again":
        StageSaver.save = save  # type: ignore[method-assign]
    else:
        Worker.run = run  # type: ignore[method-assign]
    images, labels = load_dataset("digits")[0].images[:100], load_dataset("digits")[0].labels[:100]
    trainer = Trainer(
        small_conv(in_channels=1, num_classes=10, image_size=8),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        engine="processes",
        sinks=[Stop()],
        print_freq=1,
        threads=1,
        snapshot_every=1,
        keep_snapshots=1,
        snapshot_dir=FOLDER,
    )
    result = trainer.fit((images, labels), epochs=1000, batch_size=25)
    print(f"stopped after {result.steps}, {len(result.recoveries)} recoveries")
