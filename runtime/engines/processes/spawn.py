"""The caller's side of a run whose processes it starts by itself: from a script or a notebook, on this machine.

The caller stays as it is, whatever happens to them: it sends the job, passes records on to its sinks and prints what
they print, and gets the result, or the first cause of their failure, as an exception.
"""

import contextlib
import os
import pickle
import re
import selectors
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import IO, Any

import torch

from unlocked.data.cores import usable_cores
from unlocked.runtime.control.messages import RunFailed
from unlocked.runtime.engines.pipeline import AUTO
from unlocked.runtime.engines.processes.local_launch import Started, start_processes
from unlocked.runtime.engines.processes.options import ProcessesOptions
from unlocked.runtime.engines.processes.parcel import pack_data, pack_job, set_global_state, set_loader_states
from unlocked.runtime.engines.processes.placing import auto_stages, filed_placement
from unlocked.runtime.engines.processes.reports import ENDED, FAILED, first_cause
from unlocked.runtime.job import Job, SinkMaker
from unlocked.runtime.metrics.sinks import FanOut
from unlocked.runtime.result import RunResult
from unlocked.runtime.signals import StopSignals

__all__ = ["has_launcher", "run_spawned"]

_WORKER = "unlocked.runtime.engines.processes.spawned"
_LOOK_SECONDS = 0.2  # between two looks at who lives
_OWN_WORD = re.compile(r"error( \[rank \d+\])?: ")  # a worker's, which the exception says as well
_LAST_WORDS = 20  # lines of a worker that ended without a report


def has_launcher() -> bool:
    """torchrun, or whatever else gives ranks, has started this process."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def run_spawned(engine: ProcessesOptions, job: Job, make_sinks: SinkMaker) -> RunResult:
    """Runs the job in processes of its own, and gives their result and the states of generators to this one.

    Raises:
        ValueError: a user's mistake, in whatever process it was found.
        RunFailed: a worker failed, or is lost; names its stage. A note has the worker's own traceback.
    """
    began = time.perf_counter()
    count, threads = _number_of_processes(engine, job)
    if engine.stages == AUTO:
        engine = replace(engine, stages=count)
    with start_processes(count, _WORKER, threads=threads) as started:
        run = _Run(started, make_sinks)
        with StopSignals(run.stop) as signals:
            run.send_job(engine, job)
            run.follow(engine.start_timeout)
    if run.refusal is not None:
        raise run.refusal
    if run.result is None:
        if signals.received is not None:
            signal.raise_signal(signals.received)  # in set-up there is nothing to stop in order
        raise first_cause(run.reports, run.last_words(), run.ends())
    result, state, loaders = run.result
    set_global_state(state, switches=False)
    set_loader_states(job, loaders)
    result.setup_seconds = time.perf_counter() - began - result.train_seconds
    return result


class _Run:
    """What the processes have said so far."""

    def __init__(self, started: list[Started], make_sinks: SinkMaker) -> None:
        self._started, self._make_sinks = started, make_sinks
        self._sinks: FanOut | None = None
        self._stopping = False
        self._sending, self._taking = threading.Thread(), 0
        self._tails: dict[int, list[str]] = {one.rank: [] for one in started}
        self._parts = {(one.rank, name): "" for one in started for name in ("stdout", "stderr")}  # of lines
        self._told: set[int] = set()  # ranks that have said how they failed
        self.result: tuple[RunResult, dict[str, Any], list[torch.Tensor]] | None = None
        self.reports: list[tuple[str, str, str, str | None]] = []
        self.refusal: Exception | None = None
        """What a sink raised in `on_start`: the one way in which a sink can stop a run."""

    def send_job(self, engine: ProcessesOptions, job: Job) -> None:
        """Packs it while the processes import torch, and lets a thread wait for them to take it."""
        parts = [pack_job(engine, job), pack_data(job)]
        self._sending = threading.Thread(target=self._send, args=(parts,), name="job", daemon=True)
        self._sending.start()

    def _send(self, parts: list[bytes]) -> None:
        for one in self._started:
            self._taking = one.rank
            # Who is gone has said why, or its last words do; a TypeError is of an end that was closed meanwhile.
            with contextlib.suppress(OSError, TypeError):
                for part in parts if one.rank == 0 else parts[:1]:
                    one.connection.send_bytes(part)

    def stop(self, number: int) -> None:
        """Passes a signal on: they stop in order, or end at once if they have not begun."""
        self._stopping = True
        for one in self._started:
            one.tell(number)

    def follow(self, start_timeout: float) -> None:
        """Hears all of them until they have ended, or closed their ends.

        Raises:
            RunFailed: one does not take its job within `start_timeout` seconds (it stands still, say).
        """
        deadline = time.monotonic() + start_timeout
        with selectors.DefaultSelector() as selector:
            for one in self._started:
                selector.register(one.connection, selectors.EVENT_READ, (one, None))
                for stream, target in ((one.process.stdout, "stdout"), (one.process.stderr, "stderr")):
                    assert stream is not None
                    os.set_blocking(stream.fileno(), False)
                    selector.register(stream, selectors.EVENT_READ, (one, target))
            while selector.get_map():
                ready = selector.select(_LOOK_SECONDS)
                for key, _ in ready:
                    one, target = key.data
                    if not (self._hear(one) if target is None else self._relay(one, key.fileobj, target)):
                        selector.unregister(key.fileobj)
                if time.monotonic() > deadline and self._sending.is_alive():
                    rank = self._taking
                    raise RunFailed(
                        f"the process of stage {rank} (rank {rank}) stands still: it did not take its part of the run "
                        f"within {start_timeout:g} s"
                    )
                # A child of a worker (a data loader's) may hold its ends open beyond the worker's own.
                if not ready and all(one.process.poll() is not None for one in self._started):
                    return

    def last_words(self) -> str:
        """Of the first worker that ended otherwise than by itself, for want of a report."""
        ends = [(one, one.process.poll()) for one in self._started]
        one, code = next(((one, code) for one, code in ends if code), ends[0])
        said = self._tails[one.rank]
        return _end_of(one, code) + (f": {' '.join(said)}" if said else "")

    def ends(self) -> list[str]:
        """How those ended that have said nothing of a failure: what others call lost."""
        ends = [(one, one.process.poll()) for one in self._started]
        return [
            " ".join((_end_of(one, code), *(f"| {line}" for line in self._tails[one.rank])))
            for one, code in ends
            if code and one.rank not in self._told
        ]

    def _hear(self, one: Started) -> bool:
        """One message; False: there will be none any more."""
        try:
            kind, *content = pickle.loads(one.connection.recv_bytes())
        except (EOFError, OSError):
            return False
        if kind == "result":
            result, state, loaders = content
            self.result = (result, state, loaders)
        elif kind in (FAILED, ENDED):
            self._told.add(one.rank)
            self.reports.append((kind, *content) if kind == FAILED else (FAILED, "echo", content[0], None))
        elif kind in ("sinks", "start", "sink"):
            self._tell_sinks(one, kind, *content)
        return True

    def _tell_sinks(self, one: Started, kind: str, *content: Any) -> None:
        """Makes the sinks, or passes a record on. Rank 0 waits for an answer, save to progress and to lines."""
        problem: str | None = None
        answer: bool | str | None = None
        try:
            if kind == "sinks":
                self._sinks = FanOut(self._make_sinks())
                answer = self._sinks.waits
            elif self._sinks is not None:
                method, record = content if kind == "sink" else ("on_start", *content)
                getattr(self._sinks, method)(record)
                if method in ("on_progress", "on_message"):
                    return
                answer = self._sinks.stop_reason
        except Exception as error:
            self.refusal, problem = error, f"a metrics sink refused the start: {error}"
        with contextlib.suppress(OSError):  # who is gone has said why
            one.connection.send_bytes(pickle.dumps((problem, answer)))

    def _relay(self, one: Started, stream: Any, target: str) -> bool:
        """Prints what a worker prints, here, where the caller looks; False: it has closed its end."""
        data = _read(stream)
        text = self._parts[one.rank, target] + data.decode(errors="replace")
        lines = text.splitlines(keepends=True)
        # A line may come in pieces. Its own last word can't be told from others before it is whole.
        whole = not data or text.endswith("\n") or not "error".startswith(lines[-1][:5])
        self._parts[one.rank, target] = "" if whole else lines.pop()
        quiet = self._stopping and self._sinks is None  # interrupted amid its imports, it tells of nothing else
        tail = self._tails[one.rank]
        for line in lines:
            if target == "stderr":
                tail.append(line.strip())
                del tail[:-_LAST_WORDS]
            if not quiet and not _OWN_WORD.match(line):
                getattr(sys, target).write(line)
        getattr(sys, target).flush()
        return bool(data)


def _end_of(one: Started, code: int | None) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else f"ended with code {code}"
    return f"the process of stage {one.rank} (rank {one.rank}) {how}"


def _read(stream: IO[bytes]) -> bytes:
    try:
        return os.read(stream.fileno(), 1 << 16)
    except BlockingIOError:
        return b""
    except OSError:
        return b""


def _number_of_processes(engine: ProcessesOptions, job: Job) -> tuple[int, int]:
    """One per stage, and the threads of each; unless told: one per layer, but no more than there are GPUs, or cores."""
    layers, stages = len(job.network.blocks), engine.stages
    if stages == AUTO and job.device.type == "cpu":
        return auto_stages(engine, job)
    if stages in (None, AUTO):
        placement = filed_placement(engine)
        places = torch.cuda.device_count() if job.device.type == "cuda" else usable_cores()
        count = max(1, min(layers, places)) if placement is None else len(placement.stages)
    elif isinstance(stages, str):
        count = len(job.partition([], stages))
    else:
        assert stages is not None
        count = stages
    if count > layers:
        raise ValueError(f"{count} stages for {layers} layers; give at most {layers}")
    return count, max(1, min(torch.get_num_threads(), usable_cores() // count))
