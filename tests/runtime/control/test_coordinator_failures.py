"""Workers and coordinators that die, freeze or fail: whoever is left hears of it, with the cause."""

import contextlib
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from coordination import LAYERS, TIMEOUT, make_client, until

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator

pytestmark = pytest.mark.alone


def doomed_worker(address: str, stage: int, ready: Any) -> None:
    with make_client(address, stage) as client:
        for _ in client.windows(TIMEOUT):
            ready.set()
            signal.pause()


def test_killed_process_is_named_within_seconds() -> None:
    context = multiprocessing.get_context("spawn")
    with Coordinator(LAYERS, 1000) as coordinator:
        ready = context.Event()
        worker = context.Process(target=doomed_worker, args=(coordinator.address, 1, ready), daemon=True)
        worker.start()
        aborts: list[queue.Queue[str]] = [queue.Queue(), queue.Queue()]
        clients = [make_client(coordinator.address, s, box) for s, box in zip((0, 2), aborts, strict=True)]
        try:
            for client in clients:
                client.open()
            assert ready.wait(TIMEOUT)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            killed = time.monotonic()
            told = [box.get(timeout=TIMEOUT) for box in aborts]
            assert time.monotonic() - killed < 3.0
            assert told[0] == told[1]
            assert "stage 1 (rank 1: conv3) is lost" in told[0]
            assert f"pid {worker.pid}" in told[0]
            with pytest.raises(m.RunFailed, match=r"stage 1 \(rank 1: conv3\)"):
                coordinator.results(TIMEOUT)
            with pytest.raises(m.RunFailed, match=r"stage 1 \(rank 1: conv3\)"):
                next(clients[0].windows(TIMEOUT))
        finally:
            worker.kill()
            worker.join(TIMEOUT)
            for client in clients:
                client.close()


def host_coordinator(pipe: Any) -> None:
    coordinator = Coordinator(LAYERS[:1], 1000)
    coordinator.start()
    pipe.send(coordinator.address)
    signal.pause()


def test_death_of_the_coordinator_reaches_the_workers() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=host_coordinator, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(TIMEOUT)
        aborted: queue.Queue[str] = queue.Queue()
        with make_client(ours.recv(), 0, aborted) as client:
            client.wait_started()
            process.kill()
            assert "coordinator in rank 0's process" in aborted.get(timeout=3.0)
            assert "gone" in str(client.failure)
    finally:
        process.kill()
        process.join(TIMEOUT)


@pytest.mark.parametrize("frozen", ["worker", "coordinator"])
def test_frozen_process_is_found_by_its_missing_heartbeats(frozen: str) -> None:
    """SIGSTOP keeps the connection open, so only silence tells."""
    context = multiprocessing.get_context("spawn")
    if frozen == "worker":
        with Coordinator(LAYERS[:1], 1000, heartbeat_timeout=1.0) as coordinator:
            ready = context.Event()
            process = context.Process(target=doomed_worker, args=(coordinator.address, 0, ready), daemon=True)
            process.start()
            try:
                assert ready.wait(TIMEOUT)
                assert process.pid is not None
                os.kill(process.pid, signal.SIGSTOP)
                with pytest.raises(m.RunFailed, match=r"stage 0 \(rank 0: conv1, conv2\) is lost.*no heartbeat"):
                    coordinator.results(TIMEOUT)
            finally:
                process.kill()
                process.join(TIMEOUT)
        return
    ours, theirs = context.Pipe()
    process = context.Process(target=host_coordinator, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(TIMEOUT)
        aborted: queue.Queue[str] = queue.Queue()
        with make_client(ours.recv(), 0, aborted, heartbeat_timeout=1.0) as client:
            client.wait_started()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGSTOP)
            assert "silent for 1 s" in aborted.get(timeout=TIMEOUT)
    finally:
        process.kill()
        process.join(TIMEOUT)


def host_and_fail(pipe: Any) -> None:
    coordinator = Coordinator(LAYERS[:2], 1000)
    coordinator.start()
    pipe.send(coordinator.address)
    client = make_client(coordinator.address, 0)
    client.open()
    client.wait_started()
    client.fail("conv2", "F", "out of memory")
    os._exit(1)


def test_failure_in_the_coordinators_own_process_is_told_before_it_exits() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=host_and_fail, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(TIMEOUT)
        aborted: queue.Queue[str] = queue.Queue()
        with make_client(ours.recv(), 1, aborted):
            text = aborted.get(timeout=TIMEOUT)
        assert text == "stage 0 (rank 0: conv1, conv2) failed in F of conv2: out of memory"
    finally:
        process.join(TIMEOUT)
        process.kill()


LEAVE_WITHOUT_CLOSING = """
from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator
coordinator = Coordinator([["conv1"], ["conv2"]], 10)
coordinator.start()
client = CoordinatorClient(coordinator.address, stage=0, layers=["conv1"], on_abort=print)
client.open()
client.progress_due()
"""


def test_interpreter_exits_with_everything_open() -> None:
    subprocess.run([sys.executable, "-c", LEAVE_WITHOUT_CLOSING], check=True, timeout=TIMEOUT)


def run_failing(*failures: tuple[int, bool]) -> tuple[list[str], list[queue.Queue[str]]]:
    """Stages fail in the order given (stage, echo); the causes that `fail` returned, and everyone's abort boxes."""
    boxes: list[queue.Queue[str]] = [queue.Queue() for _ in LAYERS]
    with Coordinator(LAYERS, 1000) as coordinator, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(make_client(coordinator.address, s, boxes[s])) for s in range(3)]
        for client in clients:
            client.wait_started()
        causes: list[str] = []
        threads = []
        for stage, echo in failures:

            def fail(stage: int = stage, echo: bool = echo) -> None:
                layer = LAYERS[stage][0]
                causes.append(clients[stage].fail(layer, "U", f"trouble at {layer}", echo=echo))

            threads.append(threading.Thread(target=fail))
            threads[-1].start()
            until(lambda: coordinator._failures._echo is not None or coordinator.first_failure is not None)
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        for stage in {0, 1, 2} - {stage for stage, _ in failures}:
            causes.append(boxes[stage].get(timeout=TIMEOUT))
    return causes, boxes


def test_failure_reaches_all_others_with_stage_layer_and_action() -> None:
    causes, boxes = run_failing((1, False))
    assert causes == ["stage 1 (rank 1: conv3) failed in U of conv3: trouble at conv3"] * 3
    assert boxes[1].empty(), "the failing worker must not be aborted on top of its own failure"


def test_first_cause_wins_over_an_earlier_echo() -> None:
    causes, _ = run_failing((0, True), (2, False))
    assert causes == ["stage 2 (rank 2: linear1, output) failed in U of linear1: trouble at linear1"] * 3


def test_lone_echo_is_the_cause_after_all() -> None:
    causes, _ = run_failing((0, True))
    assert causes == ["stage 0 (rank 0: conv1, conv2) failed in U of conv1: trouble at conv1"] * 3


def test_leaving_before_the_end_is_a_loss() -> None:
    with Coordinator(LAYERS[:2], 1000) as coordinator, make_client(coordinator.address, 0):
        client = make_client(coordinator.address, 1)
        with client:
            client.wait_started()
        with pytest.raises(m.RunFailed, match=r"stage 1 \(rank 1: conv3\) is lost"):
            coordinator.results(TIMEOUT)


def test_missing_stages_are_named() -> None:
    with Coordinator(LAYERS, 10, start_timeout=3) as coordinator, make_client(coordinator.address, 1) as client:
        with pytest.raises(m.RunFailed, match=r"stage 0 \(rank 0: conv1, conv2\), stage 2 .* did not report") as caught:
            client.wait_started()
        assert "stage 1" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "layers", "message"),
    [
        (0, ("other",), "same settings"),
        (3, ("conv1",), "as many workers as stages"),
        (1, ("conv3",), "its own rank"),
    ],
)
def test_worker_that_does_not_fit_fails_the_run(stage: int, layers: tuple[str, ...], message: str) -> None:
    with Coordinator(LAYERS, 10) as coordinator, make_client(coordinator.address, 1):
        until(lambda: 1 in coordinator._roster.workers)
        box: queue.Queue[str] = queue.Queue()
        with CoordinatorClient(coordinator.address, stage=stage, layers=layers, on_abort=box.put):
            assert message in box.get(timeout=TIMEOUT)
        with pytest.raises(m.RunFailed, match=message):
            coordinator.results(TIMEOUT)


def test_unfinished_stages_are_named_when_results_are_late() -> None:
    with Coordinator(LAYERS[:2], 0) as coordinator, make_client(coordinator.address, 0) as client:
        with pytest.raises(TimeoutError, match=r"stage 1 \(rank 1: conv3\)"):
            coordinator.results(0.1)
        with pytest.raises(TimeoutError, match=r"stage 0 \(rank 0: conv1, conv2\) in FINISH"):
            client.finish({}, timeout=0.2)
