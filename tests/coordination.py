"""What the tests of the coordinator share: a sink that keeps records, clients, threads, and a wait for a condition."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.metrics.records import EpochResult, StageProgress
from unlocked.runtime.metrics.sinks import MetricsSink

LAYERS = [("conv1", "conv2"), ("conv3",), ("linear1", "output")]
TIMEOUT = 10.0


class Sink(MetricsSink):
    """Collects epochs and progress."""

    def __init__(self) -> None:
        self.epochs: list[EpochResult] = []
        self.progress: list[StageProgress] = []

    def on_epoch(self, result: EpochResult) -> None:
        self.epochs.append(result)

    def on_progress(self, progress: StageProgress) -> None:
        self.progress.append(progress)


def make_client(
    address: str, stage: int, aborted: "queue.Queue[str] | None" = None, **options: Any
) -> CoordinatorClient:
    box: queue.Queue[str] = aborted if aborted is not None else queue.Queue()
    options = {"heartbeat_interval": 0.2, **options}
    return CoordinatorClient(address, stage=stage, layers=LAYERS[stage], on_abort=box.put, **options)


def in_threads(work: Callable[[int], Any], count: int = 3, seconds: float = TIMEOUT) -> list[Any]:
    """`work(stage)` in a thread per stage; their results, or the first exception."""
    results: list[Any] = [None] * count

    def run(stage: int) -> None:
        try:
            results[stage] = work(stage)
        except BaseException as error:
            results[stage] = error

    threads = [threading.Thread(target=run, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "a stage hangs"
    return results


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def progress_of(
    stage: int, position: int, seconds: float = 1.0, losses: tuple[tuple[str, float], ...] = ()
) -> StageProgress:
    return StageProgress(
        stage=stage,
        position=position,
        epoch=0,
        images=64 * position,
        busy_seconds=seconds,
        wait_seconds=0.0,
        seconds=seconds,
        local_losses=losses,
    )
