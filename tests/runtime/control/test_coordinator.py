"""The coordinator and its clients over real ZeroMQ sockets, with real threads and processes."""

import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator

import msgpack
import pytest
import zmq
from coordination import LAYERS, TIMEOUT, Sink, in_threads, make_client, progress_of, until
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.windows import WindowPolicy
from unlocked.runtime.metrics.records import EpochPart, Scores

pytestmark = pytest.mark.alone

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
                assert client.await_news(lambda: not client.unconfirmed, TIMEOUT)
                client.epoch(part)  # as a later worker does, which can't know that it has come
                assert client.await_news(lambda: not client.unconfirmed, TIMEOUT)
                client.finish({})

        assert in_threads(work) == [None] * 3
        coordinator.results(TIMEOUT)
        assert coordinator.epochs == sink.epochs
        assert [result.epoch for result in sink.epochs] == [0, 1]
        assert sink.epochs[1].local_losses == tuple((layer, 1.25) for stage in LAYERS for layer in stage)
        assert sink.epochs[1].eval_acc1 == 80.0
        assert {progress.stage for progress in sink.progress} == {0, 1, 2}


def test_an_address_is_read_back_whatever_is_in_path_and_key() -> None:
    key = next(public for public, _ in iter(zmq.curve_keypair, None) if b"#" in public)
    for endpoint in ("tcp://127.0.0.1:4711", "ipc:///tmp/a#b/coordinator"):
        assert Address.parse(str(Address(endpoint, key))) == Address(endpoint, key)
    for text in ("", "#", f"tcp://host:1{key.decode()}", "tcp://host:1#" + "#" * 40, "host:1#" + key.decode()):
        with pytest.raises(
            ValueError, match="is not a coordinator's address; valid: tcp://HOST:PORT#KEY, ipc://PATH#KEY"
        ):
            Address.parse(text)


def test_snapshot_callback_runs_once_after_the_last_stage() -> None:
    called: queue.Queue[tuple[int, m.Files]] = queue.Queue()
    with (
        Coordinator(LAYERS, 5, on_snapshot=lambda *one: called.put(one)) as coordinator,
        contextlib.ExitStack() as stack,
    ):
        clients = [stack.enter_context(make_client(coordinator.address, stage)) for stage in range(3)]
        clients[0].wait_started()
        files: list[m.Files] = [{name: (100 * stage, "ab")} for stage, (name, *_) in enumerate(LAYERS)]
        for client, own in zip(clients[:2], files, strict=False):
            client.snapshot_done(3, own)
            client.snapshot_done(4, own)
        clients[2].snapshot_done(4, files[2])
        assert called.get(timeout=TIMEOUT) == (4, files[0] | files[1] | files[2])
        assert called.empty()
        clients[2].snapshot_done(3, files[2])
        assert called.get(timeout=TIMEOUT)[0] == 3


def test_failing_snapshot_callback_fails_the_run() -> None:
    finished = threading.Event()

    def full_disk(position: int, files: m.Files) -> None:
        assert finished.wait(TIMEOUT)
        raise OSError(f"no space left for position {position}")

    with Coordinator(LAYERS[:1], 1, on_snapshot=full_disk) as coordinator:
        with make_client(coordinator.address, 0) as client:
            client.snapshot_done(1, {})
            client.finish({})
        finished.set()
        with pytest.raises(m.RunFailed, match="no space left for position 1"):
            coordinator.results(TIMEOUT)


def test_large_payloads_arrive_whole() -> None:
    blob = os.urandom(1 << 20) * 100  # 100 MiB whose chunks differ at every offset modulo 1 MiB
    with Coordinator(LAYERS[:2], 0) as coordinator:

        def work(stage: int) -> None:
            with make_client(coordinator.address, stage) as client:
                client.finish({"weights": blob if stage else b"", "names": ["a", "b"]}, timeout=60)

        assert in_threads(work, 2, 60) == [None, None]
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
        Coordinator(LAYERS[:1], 1000, on_snapshot=lambda *_: handled.set()) as coordinator,
        make_client(coordinator.address, 0) as client,
    ):
        window = next(client.windows(TIMEOUT))
        client.request_stop(signal.SIGINT)
        until(lambda: client.stopped is not None)
        client._mailbox.put(m.Need(position=window.stop))  # was under way when the stop was ordered
        client.snapshot_done(window.stop, {})
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


@pytest.mark.parametrize(
    "text",
    ["", "tcp://127.0.0.1:5", "tcp://127.0.0.1:5#zz", "ipc://x#00", "udp://x#" + "0" * 40, "tcp://x#" + "~" * 40],
)
def test_malformed_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a coordinator's address"):
        Address.parse(text)


def garbage() -> Iterator[list[bytes]]:
    """From somebody who has come through the handshake: a bug of a worker's."""
    yield [b""]
    yield [b"\xff" * 1000, b"\xff" * 1000, b"\xff"]
    yield [m.pack(m.StopRequest(signal=2))]  # but never said hello
    yield [m.pack(m.StopRequest(signal=2)), b""]
    yield [b"\xc1"]
    yield [msgpack.packb([1, 2])]
    yield [msgpack.packb({"v": m.PROTOCOL_VERSION, "kind": "Nonsense"})]
    yield [msgpack.packb({"v": m.PROTOCOL_VERSION, "kind": "Hello", "stage": "0"})]
    yield [msgpack.packb({"v": m.PROTOCOL_VERSION, "kind": "Need", "position": None})]
    yield [msgpack.packb({1: 2})]


@contextlib.contextmanager
def dealer(address: str) -> "Iterator[zmq.Socket[bytes]]":
    """Somebody who has keys."""
    with zmq.Context() as context:
        connected, monitor = dial(context, Address.parse(address), KeyPair.new())
        try:
            yield connected
        finally:
            connected.disable_monitor()
            monitor.close(linger=0)
            connected.close(linger=0)


def test_garbage_is_counted_and_ignored() -> None:
    with Coordinator(LAYERS[:1], 50) as coordinator, dealer(coordinator.address) as stranger:
        frames = list(garbage())
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
    with Coordinator(LAYERS[:1], 50) as coordinator, dealer(coordinator.address) as other:
        other.send(msgpack.packb({"v": 1, "kind": "Hello"}))
        assert other.poll(int(1000 * TIMEOUT))
        answer = m.unpack(other.recv_multipart())
        assert isinstance(answer, m.Abort)
        assert "protocol version 1" in answer.message


# --- the wire format and the window policy


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    with contextlib.suppress(m.MessageError):
        m.unpack([data])


@settings(max_examples=30)
@given(
    st.integers(0, 2**40),
    st.floats(allow_nan=False),
    st.lists(st.tuples(st.text(max_size=5), st.floats(allow_nan=False)), max_size=3),
)
def test_messages_survive_the_wire(position: int, seconds: float, losses: list[tuple[str, float]]) -> None:
    message = m.Progress(progress=progress_of(1, position, seconds, tuple(losses)))
    assert m.unpack([m.pack(message)]) == message


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
