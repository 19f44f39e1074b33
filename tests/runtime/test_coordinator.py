"""The coordinator and its clients over real ZeroMQ sockets, with real threads and processes."""

import contextlib
import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime import messages as m
from unlocked.runtime.address import Address
from unlocked.runtime.client import CoordinatorClient
from unlocked.runtime.coordinator import Coordinator
from unlocked.runtime.metrics import EpochPart, EpochResult, FanOut, Scores, StageProgress
from unlocked.runtime.windows import WindowPolicy

LAYERS = [("conv1", "conv2"), ("conv3",), ("linear1", "output")]
TIMEOUT = 10.0


class Sink(FanOut):
    """Collects epochs and progress."""

    def __init__(self) -> None:
        super().__init__()
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


def in_threads(work: Callable[[int], Any], count: int = 3) -> list[Any]:
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
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "a stage hangs"
    return results


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


# --- an undisturbed run


@pytest.mark.parametrize("first", [0, 137])
@pytest.mark.parametrize("total", [138, 3000])
def test_every_stage_gets_every_position_once_and_in_order(first: int, total: int) -> None:
    with Coordinator(LAYERS, total, first=first) as coordinator:

        def work(stage: int) -> list[int]:
            with make_client(coordinator.address, stage, heartbeat_interval=60.0) as client:
                seen = [position for window in client.windows(TIMEOUT) for position in window]
                client.finish({"stage": stage, "weights": bytes(stage)})
            return seen

        # No progress is reported and no heartbeat comes: as if all were lost, only explicit needs arrive.
        assert in_threads(work) == [list(range(first, total))] * 3
        assert coordinator.results(TIMEOUT) == {s: {"stage": s, "weights": bytes(s)} for s in range(3)}


def test_no_stage_runs_beyond_what_all_may_run() -> None:
    """Windows are granted ahead, but only a bounded number: stage 0 waits, so nobody gets the whole stream."""
    total = 100_000
    with Coordinator(LAYERS, total, queue_depth=2) as coordinator:
        clients = [make_client(coordinator.address, stage) for stage in range(3)]
        with contextlib.ExitStack() as stack:
            for client in clients:
                stack.enter_context(client)
            windows = [next(client.windows(TIMEOUT)) for client in clients]
            assert windows == [range(2 * (3 + 2))] * 3


def test_progress_and_epochs_reach_the_sink() -> None:
    sink = Sink()
    with Coordinator(LAYERS, 20, sink=sink) as coordinator:

        def work(stage: int) -> None:
            with make_client(coordinator.address, stage) as client:
                for window in client.windows(TIMEOUT):
                    client.progress(progress_of(stage, window.stop))
                for epoch in range(2):
                    scores = Scores(loss=0.5, acc1=80.0, acc5=99.0) if stage == 2 else None
                    losses = tuple((layer, epoch + 0.25) for layer in LAYERS[stage])
                    part = EpochPart(
                        stage=stage, epoch=epoch, local_losses=losses, seconds=2.0, train=scores, evaluation=scores
                    )
                    client.epoch(part)
                client.finish({})

        assert in_threads(work) == [None] * 3
        coordinator.results(TIMEOUT)
        assert coordinator.epochs == sink.epochs
        assert [result.epoch for result in sink.epochs] == [0, 1]
        assert sink.epochs[1].local_losses == tuple((layer, 1.25) for stage in LAYERS for layer in stage)
        assert sink.epochs[1].eval_acc1 == 80.0
        assert {progress.stage for progress in sink.progress} == {0, 1, 2}


def test_snapshot_callback_runs_once_after_the_last_stage() -> None:
    called: queue.Queue[int] = queue.Queue()
    with Coordinator(LAYERS, 5, on_snapshot=called.put) as coordinator, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(make_client(coordinator.address, stage)) for stage in range(3)]
        clients[0].wait_started()
        for client in clients[:2]:
            client.snapshot_done(3)
            client.snapshot_done(4)
        clients[2].snapshot_done(4)
        assert called.get(timeout=TIMEOUT) == 4
        assert called.empty()
        clients[2].snapshot_done(3)
        assert called.get(timeout=TIMEOUT) == 3


def test_failing_snapshot_callback_fails_the_run() -> None:
    finished = threading.Event()

    def full_disk(position: int) -> None:
        assert finished.wait(TIMEOUT)
        raise OSError(f"no space left for position {position}")

    with Coordinator(LAYERS[:1], 1, on_snapshot=full_disk) as coordinator:
        with make_client(coordinator.address, 0) as client:
            client.snapshot_done(1)
            client.finish({})
        finished.set()
        with pytest.raises(m.RunFailed, match="no space left for position 1"):
            coordinator.results(TIMEOUT)


def test_large_payloads_arrive_whole() -> None:
    blob = os.urandom(1 << 20) * 100  # 100 MiB whose chunks differ at every offset modulo 1 MiB
    with Coordinator(LAYERS[:2], 0) as coordinator:

        def work(stage: int) -> None:
            with make_client(coordinator.address, stage) as client:
                client.finish({"weights": blob if stage else b"", "names": ["a", "b"]}, timeout=TIMEOUT)

        assert in_threads(work, 2) == [None, None]
        results = coordinator.results(TIMEOUT)
        assert results[1]["weights"] == blob
        assert results[0] == {"weights": b"", "names": ["a", "b"]}


# --- stops


def test_orderly_stop_ends_all_stages_at_the_same_position() -> None:
    total = 10_000_000
    with Coordinator(LAYERS, total) as coordinator:
        running = threading.Barrier(3, timeout=TIMEOUT)

        def work(stage: int) -> tuple[int, m.Stop | None]:
            position = 0
            with make_client(coordinator.address, stage) as client:
                for number, window in enumerate(client.windows(TIMEOUT)):
                    assert window.start == position
                    position = window.stop
                    if number == 2:
                        running.wait()
                        if stage == 1:
                            client.request_stop(signal.SIGTERM)
                client.finish({"position": position})
                return position, client.stopped

        results = in_threads(work)
        position, stopped = results[0]
        assert results == [results[0]] * 3
        assert stopped == m.Stop(position=position, signal=signal.SIGTERM)
        assert 0 < position < total
        assert coordinator.stopped == stopped
        assert {r["position"] for r in coordinator.results(TIMEOUT).values()} == {position}


def test_nothing_is_granted_after_a_stop() -> None:
    handled = threading.Event()
    with (
        Coordinator(LAYERS[:1], 1000, on_snapshot=lambda _: handled.set()) as coordinator,
        make_client(coordinator.address, 0) as client,
    ):
        window = next(client.windows(TIMEOUT))
        client.request_stop(signal.SIGINT)
        until(lambda: client.stopped is not None)
        client._mailbox.put(m.Need(position=window.stop))  # was under way when the stop was ordered
        client.snapshot_done(window.stop)
        assert handled.wait(TIMEOUT)
        assert coordinator.stopped == m.Stop(position=window.stop, signal=signal.SIGINT)
        assert coordinator._policy.granted == window.stop
        client.finish({})


def test_stop_before_the_start_runs_nothing() -> None:
    with Coordinator(LAYERS[:1], 100) as coordinator:
        coordinator.request_stop(signal.SIGINT)
        until(lambda: coordinator.stopped is not None)
        with make_client(coordinator.address, 0) as client:
            assert list(client.windows(TIMEOUT)) == []
            assert client.stopped == m.Stop(position=0, signal=signal.SIGINT)
            client.finish({})


# --- failures


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
from unlocked.runtime.client import CoordinatorClient
from unlocked.runtime.coordinator import Coordinator
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
            until(lambda: coordinator._echo is not None or coordinator.first_failure is not None)
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
    with Coordinator(LAYERS, 10, start_timeout=0.3) as coordinator, make_client(coordinator.address, 1) as client:
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
        until(lambda: 1 in coordinator._workers)
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


# --- the port and strangers


def test_taken_port_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is taken; pass --coordinator-port 0"):
            Coordinator(LAYERS, 1, port=port)


def test_port_is_free_again_after_close() -> None:
    coordinator = Coordinator(LAYERS, 1)
    port = int(Address.parse(coordinator.address).endpoint.rpartition(":")[2])
    coordinator.close()
    Coordinator(LAYERS, 1, port=port).close()


def test_host_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"can't listen on host '192\.0\.2\.1'"):
        Coordinator(LAYERS, 1, host="192.0.2.1")


@pytest.mark.parametrize("text", ["", "tcp://127.0.0.1:5", "tcp://127.0.0.1:5#zz", "ipc://x#00"])
def test_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a coordinator's address"):
        Address.parse(text)


def garbage(token: bytes) -> Iterator[list[bytes]]:
    yield [b""]
    yield [os.urandom(16), m.pack(token, m.StopRequest(signal=2))[1]]  # well-formed, but without the token
    hello = m.Hello(stage=0, rank=0, pid=1, host="elsewhere", layers=LAYERS[0])
    yield [os.urandom(16), m.pack(token, hello)[1]]
    yield [b"\xff" * 1000, b"\xff" * 1000, b"\xff"]
    yield m.pack(token, m.StopRequest(signal=2))  # with the token, but never said hello
    yield [token, b"\xc1"]
    yield [token, msgpack.packb([1, 2])]
    yield [token, msgpack.packb({"v": 1, "kind": "Nonsense"})]
    yield [token, msgpack.packb({"v": 1, "kind": "Hello", "stage": "0"})]
    yield [token, msgpack.packb({"v": 1, "kind": "Need", "position": None})]
    yield [token, msgpack.packb({1: 2})]


def test_strangers_and_garbage_are_counted_and_ignored() -> None:
    with Coordinator(LAYERS[:1], 50) as coordinator, zmq.Context() as context:
        address = Address.parse(coordinator.address)
        host, port = address.endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(500))  # ZeroMQ takes some of it for old-style frames
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(address.endpoint)
            frames = list(garbage(address.token))
            for parts in frames:
                stranger.send_multipart(parts)
            until(lambda: coordinator.ignored_frames >= len(frames))
            with make_client(coordinator.address, 0) as client:
                assert [p for window in client.windows(TIMEOUT) for p in window] == list(range(50))
                client.finish({"fine": True})
            assert coordinator.results(TIMEOUT) == {0: {"fine": True}}
            assert coordinator.stopped is None
            assert coordinator.first_failure is None


def test_worker_of_another_release_is_told_so() -> None:
    with Coordinator(LAYERS[:1], 50) as coordinator, zmq.Context() as context:
        address = Address.parse(coordinator.address)
        with context.socket(zmq.DEALER) as other:
            other.setsockopt(zmq.LINGER, 0)
            other.connect(address.endpoint)
            other.send_multipart([address.token, msgpack.packb({"v": 2, "kind": "Hello"})])
            assert other.poll(int(1000 * TIMEOUT))
            answer = m.unpack(address.token, other.recv_multipart())
        assert isinstance(answer, m.Abort)
        assert "protocol version 2" in answer.message


# --- the wire format and the window policy


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    with contextlib.suppress(m.MessageError):
        m.unpack(b"token", [b"token", data])


@settings(max_examples=30)
@given(
    st.integers(0, 2**40),
    st.floats(allow_nan=False),
    st.lists(st.tuples(st.text(max_size=5), st.floats(allow_nan=False)), max_size=3),
)
def test_messages_survive_the_wire(position: int, seconds: float, losses: list[tuple[str, float]]) -> None:
    message = m.Progress(progress=progress_of(1, position, seconds, tuple(losses)))
    assert m.unpack(b"t", m.pack(b"t", message)) == message


@given(
    minimum=st.integers(1, 50),
    total=st.integers(0, 5000),
    rate=st.floats(0.5, 1e5),
    interval=st.floats(0.001, 2.0),
)
def test_windows_grow_and_stay_near_the_leader(minimum: int, total: int, rate: float, interval: float) -> None:
    """A stage that always runs as fast as it can at `rate` is never left without work, nor given far too much."""
    policy = WindowPolicy(0, total, minimum)
    now, position, granted = 0.0, 0, 0
    policy.observe(0, now)
    for _ in range(200):
        policy.extend()
        assert policy.granted >= granted
        granted = policy.granted
        assert granted == total or granted > position
        assert granted - position <= max(2 * minimum, 2 * (rate * 0.5 + 1), 0)
        now += interval
        position = min(granted, position + int(rate * interval))
        policy.observe(position, now)


def test_steady_stream_has_half_a_second_to_one_second_ahead() -> None:
    policy = WindowPolicy(0, 10**9, minimum=10)
    rate, position, grants = 1000, 0, 0
    policy.observe(0, 0.0)
    policy.extend()
    for tick in range(1, 100):
        position = min(policy.granted, position + rate // 5)
        policy.observe(position, tick / 5)
        grants += policy.extend()
    assert grants < 50, "a grant is for many positions, not an answer to every message"
    assert 0.45 * rate <= policy.granted - position <= 1.05 * rate


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
