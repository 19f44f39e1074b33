"""The coordinator under many stages: messages a second, how late windows come, memory. Real ZeroMQ on this machine.

    python benchmarks/coordinator_load.py                          # 8, 64 and 1,024 stages, 10 seconds each
    python benchmarks/coordinator_load.py --stages 1024 --seconds 30 --json load.json

One process has the coordinator, another one all clients: of each stage a worker, which tells of its progress as
a real one does, and its supervisor. Stage k is at position k behind stage 0, which does `--rate` micro-batches a second
as far as they are granted; every `--epoch` micro-batches each stage reports an epoch, which the run's files and its
lines of progress take as those of a real run do. A window's lateness is the time for which a stage had nothing to do
because it was not granted yet; its delay, the time from the first client that has heard of it to each of the others, in
which all clients share one process and its core. At the end every stage delivers its last words, and hears that all
have. Memory: the peak of the coordinator's process, and what of it the coordinator has added (to torch, above all; with
several numbers of stages in one call: to the ones before).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack
import zmq
from rich.console import Console

from unlocked.comparison.environment import environment
from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.client import PROGRESS_SECONDS
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.records import EpochPart, RunInfo, Scores, StageProgress
from unlocked.runtime.metrics.run_log import RunLog
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

BEAT_SECONDS = 1.0  # as a worker's client and a supervisor have it
TOTAL = 10**9
LOOK_MILLISECONDS = 10  # between two looks at what clients have to do; so exact are the figures


def main() -> int:
    options = parse()
    rows = [measure(stages, options) for stages in options.stages]
    for row in rows:
        print(
            f"{row['stages']:5} stages: {row['messages_per_second']:.0f} messages/s, "
            f"start {row['start_seconds']:.1f} s, "
            f"lateness p99 {1e3 * row['late_p99_seconds']:.1f} ms, delay p50 {1e3 * row['delay_p50_seconds']:.1f} ms, "
            f"p99 {1e3 * row['delay_p99_seconds']:.1f} ms, {row['epochs']} epochs, end {row['end_seconds']:.2f} s, "
            f"coordinator {row['own_memory_bytes'] >> 20} of its process's {row['memory_bytes'] >> 20} MiB and "
            f"{row['busy_cores']:.2f} cores"
        )
    if options.json is not None:
        write_json(options.json, {"environment": to_plain(environment()), "rows": rows})
    return 0


def measure(stages: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of so many stages."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    clients = context.Process(target=be_clients, args=(theirs, stages, options.seconds, options.rate, options.epoch))
    names = [(f"layer{number}",) for number in range(stages)]
    sink, before_all = FanOut(), peak_bytes()  # torch, above all
    with (
        tempfile.TemporaryDirectory() as folder,
        open("/dev/null", "w") as nowhere,
        Coordinator(names, TOTAL, sink=sink, start_timeout=300.0) as coordinator,
    ):
        sink.add([RunLog(Path(folder)), Dashboard(Console(file=nowhere), plain=True)])
        sink.on_start(described(names, options.epoch))
        coordinator.expect_supervisors(1)
        clients.start()
        ours.send(coordinator.address)
        began = ours.recv()  # all are there
        before, wall = time.process_time(), time.monotonic()
        found: dict[str, Any] = ours.recv()
        busy = (time.process_time() - before) / (time.monotonic() - wall)
        failure, epochs, ignored = coordinator.first_failure, len(coordinator.epochs), coordinator.ignored_frames
        if failure is None:
            coordinator.results(60.0)
        sink.close()
    clients.join()
    assert failure is None, failure
    assert ignored == 0, "every message is one of the run's"
    memory = {"memory_bytes": peak_bytes(), "own_memory_bytes": peak_bytes() - before_all}
    measured = {"epochs": epochs, "busy_cores": busy, **memory}
    return {"stages": stages, "start_seconds": began, **found, **measured}


def peak_bytes() -> int:
    """Of this process's resident set so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def described(names: Sequence[tuple[str, ...]], epoch: int) -> RunInfo:
    """Such a run, for those who write about it."""
    return RunInfo(
        model="simulated",
        dataset="none",
        engine="processes",
        rule="LLS",
        stages=tuple(names),
        total=TOTAL,
        epochs=TOTAL // epoch,
        steps_per_epoch=epoch,
        batch_size=1,
    )


class Client:
    """One process of the run, as the coordinator sees it."""

    def __init__(self, context: "zmq.Context[Any]", address: Address, stage: int, keys: KeyPair, works: bool) -> None:
        self.stage, self.works = stage, works
        self.socket, monitor = dial(context, address, keys)
        self.socket.disable_monitor()
        monitor.close(linger=0)
        kind = m.Hello if works else m.Supervise
        self.say(kind(stage=stage, rank=stage, pid=1, host="simulated", layers=(f"layer{stage}",)))
        self.granted, self.started, self.epochs, self.is_last, self.is_over = 0, False, 0, False, False
        self.position = 0
        progress = StageProgress(
            stage=stage,
            position=0,
            epoch=0,
            images=0,
            busy_seconds=1.0,
            wait_seconds=1.0,
            seconds=2.0,
            local_losses=((f"layer{stage}", 0.5),),
        )
        # Made once: to make it again would cost the clients, which share a process, more than the coordinator.
        self._progress: dict[str, Any] = msgpack.unpackb(m.pack(m.Progress(progress=progress)))

    def say(self, message: Any) -> None:
        self.socket.send(m.pack(message))

    def hear(self, now: float, first_heard: dict[int, float], delays: list[float]) -> None:
        while True:
            try:
                frame = self.socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            body = msgpack.unpackb(frame)  # and not more: that would cost the clients more than the coordinator
            kind = body["kind"]
            if kind == "Start":
                self.started = True
            elif kind == "Bye":
                self.is_over = True
            elif kind == "Abort":
                raise RuntimeError(body["message"])
            elif kind == "Grant" and self.works:
                self.granted = max(self.granted, body["stop"])
                delays.append(now - first_heard.setdefault(body["stop"], now))

    def advance(self, wanted: int) -> bool:
        """Does what may be done; whether it starves."""
        self.position = max(self.position, min(wanted, self.granted))
        return wanted > self.granted

    def report(self, epoch: int) -> None:
        self._progress["progress"]["position"] = self._progress["progress"]["images"] = self.position
        self.socket.send(msgpack.packb(self._progress))
        while self.position // epoch > self.epochs:
            part = EpochPart(
                stage=self.stage,
                epoch=self.epochs,
                local_losses=((f"layer{self.stage}", 0.5),),
                seconds=1.0,
                train=Scores(loss=0.5, acc1=80.0, acc5=99.0) if self.is_last else None,
                evaluation=None,
            )
            self.say(m.Epoch(part=part))
            self.epochs += 1


def be_clients(line: Connection, stages: int, seconds: float, rate: float, epoch: int) -> None:
    """All of them, in one thread."""
    address = Address.parse(line.recv())
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4 * stages + 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    began, keys = time.monotonic(), KeyPair.new()
    clients = [Client(context, address, number // 2, keys, number % 2 == 0) for number in range(2 * stages)]
    clients[-2].is_last = True
    poller = zmq.Poller()
    for client in clients:
        poller.register(client.socket, zmq.POLLIN)
    by_socket = {client.socket: client for client in clients}
    first_heard: dict[int, float] = {}
    delays: list[float] = []
    while not all(client.started for client in clients):
        for socket, _ in poller.poll(100):
            by_socket[socket].hear(time.monotonic(), first_heard, delays)
    line.send(time.monotonic() - began)
    delays.clear()
    late = run(clients, poller, by_socket, first_heard, delays, seconds, rate, epoch)
    sent = sum(late.pop("sent"))
    ending = time.monotonic()
    for client in clients:
        if client.works:
            client.say(m.Chunk(index=0, count=1, data=msgpack.packb({"layers": [f"layer{client.stage}"], "loss": 0.5})))
    while not all(client.is_over for client in clients):
        for socket, _ in poller.poll(100):
            by_socket[socket].hear(time.monotonic(), first_heard, delays)
    line.send(
        {
            "messages_per_second": sent / seconds,
            "delay_p50_seconds": statistics.median(delays),
            "delay_p99_seconds": percentile(delays, 0.99),
            "late_p99_seconds": percentile(late["late"], 0.99),
            "late_most_seconds": max(late["late"]),
            "windows": len(first_heard),
            "end_seconds": time.monotonic() - ending,
        }
    )
    context.destroy(linger=0)


def run(
    clients: Sequence[Client],
    poller: zmq.Poller,
    by_socket: dict[Any, Client],
    first_heard: dict[int, float],
    delays: list[float],
    seconds: float,
    rate: float,
    epoch: int,
) -> dict[str, list[Any]]:
    """The steady state. How long each window kept each stage waiting, and the messages sent."""
    began = time.monotonic()
    due = [(began + PROGRESS_SECONDS * number / len(clients)) for number in range(len(clients))]
    beats = [(began + BEAT_SECONDS * number / len(clients)) for number in range(len(clients))]
    starving: dict[int, float] = {}
    late: list[float] = [0.0]
    sent, beat = 0, m.pack(m.Beat(position=0))
    while time.monotonic() < began + seconds:
        for socket, _ in poller.poll(LOOK_MILLISECONDS):
            by_socket[socket].hear(time.monotonic(), first_heard, delays)
        now = time.monotonic()
        for number, client in enumerate(clients):
            if client.works:
                wanted = max(0, int(rate * (now - began)) - client.stage)
                if client.advance(wanted):
                    starving.setdefault(number, now)
                elif number in starving:
                    late.append(now - starving.pop(number))
            if client.works and now >= due[number]:
                client.report(epoch)
                due[number] += PROGRESS_SECONDS
                sent += 1
            if now >= beats[number]:
                client.socket.send(beat)
                beats[number] += BEAT_SECONDS
                sent += 1
        late.append(0.0)
    late += [now - since for since in starving.values()]
    return {"late": late, "sent": [sent]}


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[8, 64, 1024])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=2000.0, help="micro-batches a second")
    parser.add_argument("--epoch", type=int, default=4000, help="micro-batches")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
