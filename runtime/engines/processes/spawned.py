"""One of the worker processes that a script or a notebook starts by itself: gets its job from there, and reports back.

python -P -m unlocked.runtime.engines.processes.spawned FD
"""

import os
import pickle
import queue
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from unlocked.runtime.control.ending import last_act
from unlocked.runtime.control.set_up import SetUp
from unlocked.runtime.control.world import World
from unlocked.runtime.metrics.records import EpochResult, RunInfo, StageProgress, StepResult
from unlocked.runtime.metrics.sinks import MetricsSink

__all__ = ["main"]

_WAITING = 1000  # records that a caller which does not listen (it was stopped, say) may leave


class _Caller:
    """The process that waits for the result. A thread sends, so that nothing here waits for the caller."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, name="caller", daemon=True)
        self._thread.start()

    def send(self, *message: Any, may_be_lost: bool = False) -> None:
        if not may_be_lost or self._waiting.qsize() < _WAITING:
            self._waiting.put(message)

    def receive(self) -> Any:
        """The next message from there; a caller that is gone ends this process (`follow_launcher`)."""
        return pickle.loads(self._connection.recv_bytes())

    def receive_bytes(self) -> bytes:
        return self._connection.recv_bytes()

    def flush(self, seconds: float) -> None:
        """Waits until all is sent."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _send(self) -> None:
        try:
            while (message := self._waiting.get()) is not None:
                # Not `send`, whose pickler would hand tensors over as descriptors of shared memory.
                self._connection.send_bytes(pickle.dumps(message))
        except OSError:
            pass  # nobody listens any more


class _Forward(MetricsSink):
    """Passes everything that rank 0 hears on to the caller's sinks."""

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller
        self.waits_at_epochs = self._ask("sinks")

    def on_start(self, info: RunInfo) -> None:
        self._obey(self._ask("start", info))

    def on_progress(self, progress: StageProgress) -> None:
        self._caller.send("sink", "on_progress", progress, may_be_lost=True)

    def on_step(self, step: StepResult) -> None:
        self._obey(self._ask("sink", "on_step", step))

    def on_epoch(self, result: EpochResult) -> None:
        self._obey(self._ask("sink", "on_epoch", result))

    def on_message(self, text: str) -> None:
        self._caller.send("sink", "on_message", text)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        """The caller knows by itself."""

    def _ask(self, *message: Any) -> Any:
        """The caller's answer. Raises: ValueError: one of its sinks refuses the start."""
        self._caller.send(*message)
        problem, answer = self._caller.receive()
        if problem is not None:
            raise ValueError(problem)
        return answer

    def _obey(self, reason: str) -> None:
        """One of the caller's sinks has stopped the run."""
        if reason:
            self.stop(reason)


def main(descriptor: int) -> int:
    """Runs one job; the exit code. What goes wrong is told to the caller, who raises it."""
    os.set_inheritable(descriptor, False)
    # Before torch is imported, which takes seconds: from here on the other processes see this one's end.
    set_up = SetUp.begin(World.from_environment())
    caller = _Caller(Connection(descriptor))

    def tell(message: str) -> None:
        caller.send("ended", message)
        caller.flush(1.0)

    try:
        with last_act(tell):
            _run(caller)
        caller.flush(600.0)
    except BaseException as error:
        from unlocked.runtime.engines.processes.reports import report

        caller.send(*report(error))
        caller.flush(5.0)
        return 1
    finally:
        set_up.done()
    return 0


def _run(caller: _Caller) -> None:
    # Imported here: torch takes seconds.
    from dataclasses import replace

    from unlocked.runtime.engines.processes.parcel import global_state, loader_states, set_global_state, unpack
    from unlocked.runtime.machine import set_threads
    from unlocked.runtime.network import kept_modes

    engine, job, state = unpack(caller.receive_bytes())
    if os.environ["RANK"] == "0":
        train, test = unpack(caller.receive_bytes())
        job = replace(job, train=train, test=test)
    set_global_state(state)
    set_threads(job.settings.threads)
    with job.settings.library_kernels(), kept_modes(job.network):
        result = engine.run(job, lambda: [_Forward(caller)])
    if result.is_complete:
        caller.send("result", result, global_state(), loader_states(job))


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # native threads of a broken process group may never end
