"""The coordinator: one thread in rank 0's process that all workers talk to.

It hands out the stream in windows, gathers metrics and final payloads, notices lost workers, and makes one failure (or
signal) reach all. No tensor comes here, and no step waits: windows are granted ahead.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import zmq

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Post
from unlocked.runtime.control.callbacks import CallbackThread
from unlocked.runtime.control.edge_book import EdgeBook
from unlocked.runtime.control.entrance import Door, Entrance, most_connections
from unlocked.runtime.control.failures import Failures
from unlocked.runtime.control.ledger import Ledger
from unlocked.runtime.control.mailbox import Mailbox
from unlocked.runtime.control.member import Member, Roster
from unlocked.runtime.control.pulse import Pulse
from unlocked.runtime.control.recoveries import Recoveries
from unlocked.runtime.control.windows import EpochGate, WindowPolicy
from unlocked.runtime.metrics.records import EpochResult, Recovery
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.schedules.marks import TimedMarks

__all__ = ["Coordinator"]


class Coordinator:
    """Serves one run of `len(stages)` workers. Use: construct, pass `address` on, `start`, `results`, `close`.

    Args:
        stages: the layer names of each stage, in order; a worker that reports other layers fails the run.
        total: length of the stream; `first` is where it starts (above 0 after a resume).
        queue_depth: of the edges between stages; sets the smallest window.
        host, port: where to listen; this machine's name or address (0.0.0.0: all) or `ipc://PATH`; port 0: any free.
        advertise: the host name other machines reach this one by; default `host`, or this machine's name for 0.0.0.0.
        admits: whether a public key (Z85) is that of one of the run's processes; default: whoever knows `address` is.
            Called in the coordinator's thread, so it must not wait.
        gate: holds the stream back at the ends of epochs, where a learning rate waits for the test loss.
        marks: where the run saves itself by the clock.
        sink: receives progress, steps, epochs and messages, in a thread of the coordinator's.
        on_snapshot: called in that thread with a position, and with size and checksum of every layer's file, once
            every stage has reported its snapshot of it. An exception in it fails the run.
        stop_at: from the position that is granted to the one at which an orderly stop takes effect, in the same epoch.
        start_timeout: seconds for all workers to say hello.
        heartbeat_timeout: seconds of silence after which a connected worker counts as lost.

    Raises:
        ValueError: port taken, host not this machine's, or a nonsensical stream.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[str]],
        total: int,
        *,
        first: int = 0,
        queue_depth: int = 2,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        admits: Callable[[bytes], bool] = lambda _: True,
        gate: EpochGate | None = None,
        marks: TimedMarks | None = None,
        sink: MetricsSink | None = None,
        on_snapshot: Callable[[int, m.Files], None] | None = None,
        stop_at: Callable[[int], int] | None = None,
        start_timeout: float = 120.0,
        heartbeat_timeout: float = 30.0,
    ) -> None:
        if not stages or not 0 <= first <= total:
            raise ValueError(f"{len(stages)} stages, positions {first} to {total}; valid: 1 stage, 0 <= first <= total")
        self._stages = [tuple(layers) for layers in stages]
        self._first, self._total = first, total
        self._policy = WindowPolicy(first, total, minimum=2 * (len(stages) + queue_depth), marks=marks)
        self._policy.limit = total if gate is None else gate.limit
        self._gate, self._sink = gate, sink or FanOut()
        self._on_snapshot, self._stop_at = on_snapshot or (lambda *_: None), stop_at or (lambda position: position)
        self._start_timeout, self._heartbeat_timeout = start_timeout, heartbeat_timeout
        self._ledger = Ledger(len(stages))
        self._roster = Roster(self._stages)
        self._changed, self._mailbox = threading.Condition(), Mailbox()
        self._context = zmq.Context()
        try:
            size: dict[str, Any] = {"most": most_connections(len(stages)), "ranks": len(stages)}
            self._entrance = Entrance(self._context, host, port, advertise, **size, admits=admits)
        except ValueError:
            self._context.term()
            self._mailbox.close()
            raise
        self._socket, self._door = self._entrance.socket, self._entrance.door
        self._callbacks = CallbackThread(self._callback_failed)
        self._callback_error: str | None = None
        self._send = Post(self._socket).send
        self._failures = Failures(self._roster.everybody, self._send, self._changed)
        how: dict[str, Any] = {"on_recovery": self._recovered, "silence": heartbeat_timeout, "door": self._door}
        self._recoveries = Recoveries(self._roster, self._failures, send=self._send, first=first, **how)
        self._edges = EdgeBook(self._roster, self._send)
        self._pulse = Pulse(self._roster, self._failures, self._recoveries, self._send, heartbeat_timeout)
        self._running, self._complete = True, False
        self.stopped: m.Stop | None = None
        """Set once an orderly stop was ordered: the final position and the signal."""
        self.recoveries: list[Recovery] = []
        """Of workers, in order."""
        self.ignored_frames = 0
        """Messages that were malformed, or not a worker's."""
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)

    @property
    def address(self) -> str:
        """What `CoordinatorClient` needs: endpoint and public key."""
        return str(self._entrance.address)

    @property
    def strangers(self) -> int:
        """Connections that failed in the handshake, or are still in it."""
        return self._entrance.strangers

    @property
    def epochs(self) -> list[EpochResult]:
        """The epochs that all stages have reported, in order; final once `results` has returned."""
        return self._ledger.epochs

    @property
    def first_failure(self) -> str | None:
        """The first cause of an abort; None while all is well."""
        return self._failures.first

    def start(self) -> None:
        """Begins to serve; the start timeout runs from here."""
        self._callbacks.start()
        self._thread.start()

    def expect_supervisors(self, max_recoveries: int, store: Door | None = None) -> None:
        """Every worker has a supervisor, and so many of them may be replaced within an hour. Before the last worker has
        said hello. `store`: the door of the store at which they meet."""
        self._recoveries.most, self._recoveries.store, self._roster.supervised = max_recoveries, store, True

    def request_stop(self, signal: int | None = None, reason: str = "") -> None:
        """Orders an orderly stop: no further windows. From any thread or signal handler; returns at once."""
        self._mailbox.put(m.StopRequest(signal=signal, reason=reason))

    def abort(self, message: str) -> None:
        """Fails the run on behalf of rank 0's own code; `message` becomes the first cause unless there is one."""
        self._mailbox.put(m.Abort(message=message))

    def results(self, timeout: float = 600.0) -> dict[int, Any]:
        """Waits until every stage has finished; {stage: payload}. All callbacks have run by then.

        Raises:
            RunFailed: the run was aborted; carries the first cause.
            TimeoutError: names the stages that have not finished.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._complete or self.first_failure is not None, timeout)
            if self.first_failure is not None:
                raise m.RunFailed(self.first_failure)
            if not done:
                missing = ", ".join(self._roster.name(s) for s in self._ledger.unfinished)
                raise TimeoutError(f"coordinator: no final results after {timeout:g} s from {missing}")
        if not self._callbacks.drain(timeout):
            raise TimeoutError(f"coordinator: metrics sinks or the snapshot callback still run after {timeout:g} s")
        if self._callback_error is not None:
            raise m.RunFailed(self._callback_error)
        return dict(self._ledger.results)

    def close(self) -> None:
        """Ends the thread and frees the port. Idempotent."""
        self._mailbox.put(None)
        if self._thread.is_alive():
            self._thread.join(10.0)
        self._callbacks.close()
        if not self._socket.closed and not self._thread.is_alive():
            self._shut()

    def __enter__(self) -> "Coordinator":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        self._entrance.register(poller)
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        self._ticked = time.monotonic()
        self._start_deadline = self._ticked + self._start_timeout
        try:
            while self._running:
                poller.poll(50 if self._failures.pending or self._recoveries.pending else 250)
                self._entrance.serve()
                self._receive()
                for order in self._mailbox.drain():
                    self._obey(order)
                self._tick(time.monotonic())
        except Exception as error:  # our own bug, but still nobody may hang
            self._failures.fail(f"coordinator: {type(error).__name__}: {error}")
            self._send_all(m.Abort(message=self.first_failure or ""))
            raise
        finally:
            self._shut()

    def _shut(self) -> None:
        self._door.remove()
        self._entrance.close(linger=1000)
        self._context.term()
        self._mailbox.close()

    def _receive(self) -> None:
        for _ in range(1000):  # then let the clock have its turn
            try:
                identity, *frames = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                message = m.unpack(frames)
                handler = _HANDLERS.get(type(message))
                member = self._roster.find(identity)
                if isinstance(message, m.Hello | m.Supervise):
                    self._hello(identity, message)
                elif handler is None or member is None:
                    raise m.MessageError("not a worker's message")
                else:
                    member.heard = time.monotonic()
                    handler(self, member, message)
            except m.VersionError as error:
                self.ignored_frames += 1
                self._send(identity, m.Abort(message=f"coordinator: {error}"))
                self._failures.fail(f"coordinator: a worker speaks {error}")
            except m.MessageError:
                self.ignored_frames += 1

    def _obey(self, order: Any) -> None:
        if order is None:
            self._running = False
        elif isinstance(order, m.StopRequest):
            self._stop(None, order)
        elif isinstance(order, m.Abort):
            self._failures.fail(order.message)
        elif isinstance(order, EpochResult) and self._gate is not None:  # it has been heard of
            self._gate.let_pass(order.epoch)
            self._policy.limit = self._gate.limit
            self._extend()

    def _tick(self, now: float) -> None:
        stood, self._ticked = now - self._ticked, now
        if stood > self._heartbeat_timeout and self._roster.is_complete:
            self._failures.fail(
                f"{self._roster.name(0)} is lost: its process, with the coordinator, stood still for {stood:.1f} s"
            )
        if not self._complete:  # else whoever leaves may
            self._pulse.tick(now, self._policy.granted)
        if not self._roster.is_complete and now > self._start_deadline:
            missing = ", ".join(self._roster.missing)
            self._failures.fail(f"coordinator: {missing} did not report within {self._start_timeout:g} s of the start")
        self._failures.tick(now)
        self._recoveries.tick(now)

    def _hello(self, identity: bytes, hello: m.Hello | m.Supervise) -> None:
        member = Member(identity, hello, time.monotonic(), self._first)
        if isinstance(hello, m.Hello) and self._recoveries.is_late(hello):
            return
        problem = self.first_failure or self._roster.problem(member)
        if problem:
            self._send(identity, m.Abort(message=problem))
            self._failures.fail(problem)  # unless there is a first cause already
            return
        started = self._roster.is_complete
        self._roster.add(member)
        self._recoveries.met(member)
        if started:
            self._recoveries.came_back(member)
            self._edges.came_back(member)  # before its start: its links of before are not to be tried
            self._begin(member)
        elif self._roster.is_complete:
            self._door.close()
            self._policy.observe(self._first, time.monotonic())
            for one in self._roster.everybody():
                self._begin(one)
            self._extend()

    def _begin(self, member: Member) -> None:
        saved = self._ledger.saved(member.hello.stage)
        self._send(member.identity, m.Start(first=self._first, total=self._total, saved=saved, clock=time.time()))
        self._send(member.identity, self._grant())
        for word in filter(None, (self.stopped, m.Bye() if self._complete else None)):
            self._send(member.identity, word)

    def _recovered(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)
        self._say(recovery.told(self._roster.name(recovery.stage)))

    def _beat(self, member: Member, beat: m.Beat | m.Need) -> None:
        self._advance(member, beat.position)
        if isinstance(beat, m.Need) and self._policy.granted > beat.position:
            self._send(member.identity, self._grant())

    def _progress(self, member: Member, message: m.Progress) -> None:
        self._advance(member, message.progress.position)
        self._callbacks.post(self._sink.on_progress, message.progress, lossy=True)

    def _step(self, member: Member, message: m.Step) -> None:
        if self._ledger.is_new(message.step):
            self._callbacks.post(self._sink.on_step, message.step)

    def _epoch(self, member: Member, message: m.Epoch) -> None:
        for result in self._ledger.epoch(message.part)[1]:
            self._callbacks.post(self._sink.on_epoch, result)
            if self._gate is not None:  # before any sink has heard: a snapshot of this place is to have the loss
                self._say(self._gate.observe(result.epoch, result.eval_loss))
            if self._gate is not None and self._gate.for_sinks:
                self._callbacks.post(self._mailbox.put, result)
            else:
                self._obey(result)
        self._send(member.identity, m.EpochSeen(epoch=message.part.epoch))

    def _snapshot(self, member: Member, message: m.SnapshotDone) -> None:
        files = self._ledger.snapshot(member.hello.stage, message.position, message.files)
        if files is not None:
            self._callbacks.post(self._on_snapshot, message.position, files, important=True)
        self._send(member.identity, m.SnapshotSeen(position=message.position))

    def _chunk(self, member: Member, chunk: m.Chunk) -> None:
        try:
            with self._changed:
                self._ledger.chunk(member, chunk)
        except m.MessageError:
            raise
        except ValueError as error:
            self._failures.fail(str(error))
            return
        self._send(member.identity, m.ChunkSeen(index=chunk.index))
        if self._ledger.is_finished and not self._complete and self.first_failure is None:
            self._send_all(m.Bye())
            if self.strangers:
                self._say(f"{self.strangers} connections to the coordinator were not of this run, and were refused")
            with self._changed:
                self._complete = True
                self._changed.notify_all()

    def _stop(self, member: Member | None, request: m.StopRequest) -> None:
        if self.stopped is None:
            self.stopped = m.Stop(position=self._stop_at(self._policy.granted), signal=request.signal)
            source = request.reason or ("the coordinator" if member is None else member.name)
            self._say(f"stopping after position {self.stopped.position} of {self._total}, asked for by {source}")
            self._send_all(self.stopped)

    def _failed(self, member: Member, failure: m.Failure) -> None:
        if self._failures.reported(member, failure):
            self._pulse.hurry()  # finds out whose connection is gone

    def _advance(self, member: Member, position: int) -> None:
        member.position = max(member.position, position)
        if self._roster.is_complete:
            self._policy.observe(position, time.monotonic())
            self._extend()

    def _extend(self) -> None:
        if self.stopped is None and self.first_failure is None and self._policy.extend():
            self._send_all(self._grant(), self._roster.workers.values())  # their supervisors run nothing

    def _grant(self) -> m.Grant:
        factor = self._gate.factor if self._gate else 1.0
        return m.Grant(stop=self._policy.granted, lr_factor=factor, mark=self._policy.mark)

    def _callback_failed(self, error: Exception) -> None:
        self._callback_error = f"coordinator: the callback after a snapshot failed: {type(error).__name__}: {error}"
        self.abort(self._callback_error)

    def _say(self, text: str | None) -> None:
        if text is not None:
            self._callbacks.post(self._sink.on_message, text)

    def _send_all(self, message: Any, members: Iterable[Member] = ()) -> None:
        for member in tuple(members) or self._roster.everybody():
            self._send(member.identity, message)


_HANDLERS: dict[type, Callable[[Coordinator, Member, Any], None]] = {
    m.Beat: Coordinator._beat,
    m.Need: Coordinator._beat,
    m.Progress: Coordinator._progress,
    m.Step: Coordinator._step,
    m.Epoch: Coordinator._epoch,
    m.SnapshotDone: Coordinator._snapshot,
    m.Chunk: Coordinator._chunk,
    m.StopRequest: Coordinator._stop,
    m.Failure: Coordinator._failed,
    m.AbortSeen: lambda self, member, _: self._failures.told(member),
    m.Died: lambda self, member, message: self._recoveries.died(member, message),
    m.Kept: lambda self, member, message: self._edges.kept(member, message),
    m.EdgeBroken: lambda self, member, message: self._edges.broken(member, message),
    m.Replayed: lambda self, member, message: self._recoveries.replayed(member, message),
}
