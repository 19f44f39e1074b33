"""A worker's side of the coordinator: windows in; progress, results and failures out.

One background thread owns the socket, so heartbeats and aborts work while the main thread waits inside native code.
"""

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgpack
import zmq

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.dealing import flush, received
from unlocked.runtime.control.mailbox import Mailbox
from unlocked.runtime.metrics.records import EpochPart, StageProgress, StepResult

__all__ = ["CoordinatorClient"]

PROGRESS_SECONDS = 0.2
"""Progress is sent at most this often."""
CHUNKS_AHEAD = 2
"""Final payloads: chunks under way at once, so that memory stays bounded on both sides."""


class CoordinatorClient:
    """Connects one worker to the run's coordinator. Use: construct, `open`, iterate `windows`, `finish`.

    Args:
        address: the coordinator's `address`.
        stage, rank, layers: who this worker is; named in all errors.
        on_abort: called once, from the background thread, when the run is over for a reason outside this worker
            (another worker's failure, the coordinator's death). The main thread may be stuck in native code then, so
            the callback should print its message and end the process.
        heartbeat_interval: seconds between signs of life.
        heartbeat_timeout: seconds without a sign of the coordinator after which it counts as lost.
        start_timeout: seconds for all workers to be there.
        incarnation: which of the stage's workers this is; 0 is the first.
        keys: this process's, whose public one the coordinator admits; default: new ones.

    Raises:
        ValueError: `address` is malformed.
    """

    def __init__(
        self,
        address: str,
        *,
        stage: int,
        rank: int | None = None,
        layers: Sequence[str] = (),
        on_abort: Callable[[str], None],
        heartbeat_interval: float = 1.0,
        heartbeat_timeout: float = 30.0,
        start_timeout: float = 120.0,
        incarnation: int = 0,
        keys: KeyPair | None = None,
    ) -> None:
        self._address, self._keys = Address.parse(address), keys or KeyPair.new()
        self.stage = stage
        self._rank, self._layers = stage if rank is None else rank, tuple(layers)
        self._on_abort = on_abort
        self._beat_interval, self._beat_timeout = heartbeat_interval, heartbeat_timeout
        self._start_timeout, self._incarnation = start_timeout, incarnation
        self._changed = threading.Condition()
        self._mailbox = Mailbox()
        self._latest_progress: StageProgress | None = None
        self._progress_time = -PROGRESS_SECONDS
        self._position = self._granted = 0
        self._start: m.Start | None = None
        self._failed: str | None = None
        self._failing = False
        self._chunks_seen = 0
        self._bye = self._closing = False
        self.lr_factor = 1.0
        """What the coordinator has set for the epoch of the latest window; see `windows.EpochGate`."""
        self.marks: frozenset[int] = frozenset()
        """The micro-batch behind which every stage saves itself by the clock, if it lies ahead."""
        self.stopped: m.Stop | None = None
        """Set once an orderly stop is under way: the position at which all stages stop, and the signal."""
        self.generations: dict[int, int] = {}
        """How often the links at this stage were formed anew, by the stage that they lead into."""
        self.on_rejoin: list[Callable[[], None]] = []  # called in the client's thread when that has changed
        self.saved = 0
        """The position of the latest snapshot in which the coordinator has counted this stage's part."""
        self.unconfirmed: tuple[EpochPart, ...] = ()
        """Parts of epochs that may have been lost on their way: whoever takes over from this worker says them again."""
        self.clock_ahead = 0.0
        """Seconds by which this machine's clock is ahead of the coordinator's; 0 where that may be the way's delay."""
        self.kept = 0
        """Micro-batches of the outgoing edge that the next stage will never ask for again."""
        self._thread = threading.Thread(target=self._run, name="coordinator-client", daemon=True)

    @property
    def name(self) -> str:
        """`stage 1 (rank 1: conv3, linear1)`."""
        return m.stage_name(self.stage, self._rank, self._layers)

    @property
    def failure(self) -> str | None:
        """Why the run was aborted; None while all is well."""
        return self._failed

    def open(self) -> None:
        """Says hello and starts the heartbeats; does not wait. Call it before slow set-up, so that a failure there
        reaches everyone."""
        self._thread.start()

    def wait_started(self) -> None:
        """Waits until all workers have said hello (`windows` does so too).

        Raises:
            RunFailed, TimeoutError: as for `windows`.
        """
        self._wait(lambda: self._start is not None, self._start_timeout, "START: waiting for all workers")

    def windows(self, timeout: float = 60.0, first: int | None = None) -> Iterator[range]:
        """The stream, window by window: consecutive ranges of positions, all of which this stage must complete, from
        position `first` on (default: the run's first).

        Ends after the last position, or after an orderly stop's (see `stopped`); all stages end at the same one.

        Raises:
            RunFailed: the run was aborted.
            TimeoutError: no answer within `timeout` seconds.
        """
        self.wait_started()
        assert self._start is not None
        position = self._start.first if first is None else first
        while position < self._start.total:
            self._position = position
            if self._granted <= position and self.stopped is None:
                self._mailbox.put(m.Need(position=position))
                self._wait(
                    lambda at=position: self._granted > at or self.stopped is not None,  # type: ignore[misc]
                    timeout,
                    f"WINDOW: waiting for positions from {position}",
                )
            with self._changed:
                self._check()
                window = range(position, max(position, self._granted))
            if not window:
                break  # stopped
            yield window
            position = window.stop
        self._position = position

    def await_news(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Waits until `ready`, which is asked whenever something has come from the coordinator or by `wake`; False
        after `timeout` seconds.

        Raises:
            RunFailed: the run was aborted.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: ready() or self._failed is not None, timeout)
            self._check()
            return done

    def wake(self) -> None:
        """Has whoever waits for news look again."""
        with self._changed:
            self._changed.notify_all()

    def tell(self, message: m.Kept | m.EdgeBroken | m.Replayed) -> None:
        """Says something that is rare; reliable."""
        self._mailbox.put(message)

    def progress_due(self) -> bool:
        """True if `progress` would send: read device counters only then."""
        return time.monotonic() - self._progress_time >= PROGRESS_SECONDS

    def progress(self, progress: StageProgress) -> None:
        """Reports how far this stage is; cheap, never blocks, may be lost."""
        self._position = progress.position
        if self.progress_due():
            self._progress_time = time.monotonic()
            self._latest_progress = progress
            self._mailbox.put(None)

    def step(self, step: StepResult) -> None:
        """Reports the training meters (last stage, every `print_freq` steps); reliable."""
        self._mailbox.put(m.Step(step=step))

    def epoch(self, part: EpochPart) -> None:
        """Reports this stage's part of an epoch's result; reliable, see `unconfirmed`. In the order of the epochs."""
        with self._changed:
            self.unconfirmed += (part,)
        self._mailbox.put(m.Epoch(part=part))

    def snapshot_done(self, position: int, files: Mapping[str, tuple[int, str]]) -> None:
        """This stage's part of the snapshot from which a run goes on at `position` is on the disk; reliable. From any
        thread.

        Args:
            files: each of its layers' size and checksum.
        """
        self._mailbox.put(m.SnapshotDone(position=position, files={k: (v[0], v[1]) for k, v in files.items()}))

    def request_stop(self, signal: int | None = None) -> None:
        """Asks for an orderly stop of all stages. Returns at once; safe in a signal handler."""
        self._mailbox.put(m.StopRequest(signal=signal))

    def fail(self, layer: str, action: str, message: str, *, echo: bool = False, timeout: float = 4.0) -> str:
        """Tells everyone that this worker fails; `on_abort` is not called here. The caller then ends the process.

        Args:
            layer, action: where, e.g. "conv2" and "U".
            message: what, e.g. the exception's type and text.
            echo: it failed while talking to a neighbour, so another worker's own report is the better cause.
            timeout: seconds to wait for the coordinator's answer, by when it has told the others.

        Returns:
            the run's first cause, which may be another worker's.
        """
        self._failing = True
        own = f"{self.name} failed in {action} of {layer or 'no layer'}: {message}"
        if not self._thread.is_alive():
            return self._failed or own
        failure = m.Failure(stage=self.stage, rank=self._rank, layer=layer, action=action, message=message, echo=echo)
        self._mailbox.put(failure)
        with self._changed:
            self._changed.wait_for(lambda: self._failed is not None, timeout)
        return self._failed or own

    def finish(self, payload: Mapping[str, Any], timeout: float = 600.0) -> None:
        """Delivers this stage's final payload (msgpack types; bytes of any size) and waits for all others' to arrive.

        Raises:
            RunFailed: the run was aborted.
            TimeoutError: it takes longer than `timeout` seconds; names what is missing.
        """
        data = memoryview(msgpack.packb(payload))
        count = -(-len(data) // m.CHUNK_BYTES)
        deadline = time.monotonic() + timeout
        for i in range(count):
            self._wait(
                lambda least=i - CHUNKS_AHEAD: self._chunks_seen > least,  # type: ignore[misc]
                deadline - time.monotonic(),
                f"FINISH: sending its final payload, part {i + 1} of {count}",
            )
            part = bytes(data[i * m.CHUNK_BYTES : (i + 1) * m.CHUNK_BYTES])
            self._mailbox.put(m.Chunk(index=i, count=count, data=part))
        del data
        self._wait(
            lambda: self._bye, deadline - time.monotonic(), "FINISH: waiting for the other stages' final payloads"
        )
        self._thread.join(5.0)

    def close(self) -> None:
        """Ends the background thread. Idempotent; without a `finish` the coordinator counts this worker as lost."""
        self._closing = True
        self._mailbox.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def __enter__(self) -> "CoordinatorClient":
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the main thread's waits

    def _check(self) -> None:
        if self._failed is not None:
            raise m.RunFailed(self._failed)

    def _wait(self, ready: Callable[[], bool], timeout: float, doing: str) -> None:
        with self._changed:
            done = self._changed.wait_for(lambda: ready() or self._failed is not None, max(timeout, 0.0))
            self._check()
        if not done:
            raise TimeoutError(
                f"{self.name} in {doing}: no answer within {timeout:.0f} s from the coordinator at "
                f"{self._address.endpoint}"
            )

    # --- the background thread

    def _run(self) -> None:
        abort: str | None = None
        context = zmq.Context()
        dealer, monitor = dial(context, self._address, self._keys)
        try:
            abort = self._serve(dealer, monitor)
        except Exception as error:  # our own bug, but the main thread must not wait for ever
            abort = f"{self.name}: its coordinator client broke: {type(error).__name__}: {error}"
        finally:
            dealer.disable_monitor()
            monitor.close(linger=0)  # an open socket would make term() wait for ever
            dealer.close(linger=300)  # lets the last words out before on_abort ends the process
            context.term()
            self._mailbox.close()
            if abort is not None:
                self._set_failed(abort)

    def _set_failed(self, message: str) -> None:
        with self._changed:
            self._failed = message
            self._changed.notify_all()
        if not self._failing:
            self._on_abort(message)

    def _serve(self, dealer: "zmq.Socket[Any]", monitor: "zmq.Socket[Any]") -> str | None:
        """Talks until the end; returns why the run is over, None if all is well."""
        outbox: deque[Any] = deque()
        pid, host = os.getpid(), socket.gethostname()
        layers, incarnation = self._layers, self._incarnation
        hello = m.Hello(stage=self.stage, rank=self._rank, pid=pid, host=host, layers=layers, incarnation=incarnation)
        outbox.append(hello)
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._mailbox.fileno(), zmq.POLLIN)
        heard = before = time.monotonic()
        met = False
        next_beat = heard + self._beat_interval
        while True:
            poller.register(dealer, zmq.POLLIN | (zmq.POLLOUT if outbox else 0))
            events = dict(poller.poll(max(1, int(1000 * min(next_beat - time.monotonic(), 1.0)))))
            messages = received(dealer)
            if monitor in events:  # all that arrived before the connection dropped is readable by now
                messages += received(dealer)
            now = time.monotonic()
            if messages:
                heard, met = now, True
            for message in messages:
                if isinstance(message, m.Abort):
                    flush(dealer, deque([m.AbortSeen()]))
                    return message.message
                self._take(message)
            if self._bye:
                return None
            limit = self._beat_timeout if met else self._start_timeout
            stood, before = now - before, now
            if met and stood > limit:  # by now the others have left because of this process, not it because of them
                return f"{self.name} stood still for {stood:.1f} s"
            if monitor in events:
                return f"the coordinator in rank 0's process ({self._address.endpoint}) is gone: its connection closed"
            if now - heard > limit:
                return f"the coordinator in rank 0's process ({self._address.endpoint}) is silent for {limit:g} s"
            outbox.extend(order for order in self._mailbox.drain() if order is not None)
            if now >= next_beat:
                next_beat = now + self._beat_interval
                outbox.append(m.Beat(position=self._position))
            flush(dealer, outbox)
            self._send_progress(dealer, full=bool(outbox))
            if self._closing:
                return None

    def _take(self, message: Any) -> None:
        with self._changed:
            if isinstance(message, m.Start):
                self._start, self.saved = message, max(self.saved, message.saved)
                self._granted = max(self._granted, message.first)
                self.clock_ahead = message.clock_ahead(time.time())
            elif isinstance(message, m.SnapshotSeen):
                self.saved = max(self.saved, message.position)
            elif isinstance(message, m.EpochSeen):
                self.unconfirmed = tuple(part for part in self.unconfirmed if part.epoch > message.epoch)
            elif isinstance(message, m.Grant):
                self._granted = max(self._granted, message.stop)
                self.lr_factor = message.lr_factor
                self.marks = frozenset() if message.mark is None else frozenset((message.mark,))
            elif isinstance(message, m.Stop):
                self.stopped, self._granted = message, max(self._granted, message.position)
            elif isinstance(message, m.Rejoin):
                self.generations[message.edge] = max(message.generation, self.generations.get(message.edge, 0))
                for told in self.on_rejoin:
                    told()
            elif isinstance(message, m.Kept):
                self.kept = max(message.count, self.kept)
            elif isinstance(message, m.ChunkSeen):
                self._chunks_seen = message.index + 1
            elif isinstance(message, m.Bye):
                self._bye = True
            self._changed.notify_all()

    def _send_progress(self, dealer: "zmq.Socket[Any]", full: bool) -> None:
        """Sends the latest progress, or drops it when the connection is congested."""
        progress, self._latest_progress = self._latest_progress, None
        if progress is not None and not full:
            with contextlib.suppress(zmq.Again):
                dealer.send(m.pack(m.Progress(progress=progress)), zmq.DONTWAIT)
