"""Who takes part: every way to train that the comparison knows, for a device and a number of processes."""

from dataclasses import dataclass, field

import torch

from unlocked.runtime.engines.processes.engine import Processes
from unlocked.runtime.engines.sequential import Sequential
from unlocked.runtime.engines.streams.engine import Streams
from unlocked.runtime.job import Engine

__all__ = ["ASYNCHRONOUS", "LOCAL_RULES", "SCHEDULES", "Spec", "all_contenders", "choose"]

LOCAL_RULES = ("LLS", "LLS_M", "LLS_MxM")
SCHEDULES = ("GPipe", "1F1B", "zero-bubble", "ZBV")
"""Of torch.distributed.pipelining: ScheduleGPipe, Schedule1F1B, ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble.
The last two hold two stages per process."""

ASYNCHRONOUS = ("PipeDream", "PipeDream-2BW")
"""Pipelines of backpropagation without a flush, executed by this project's own edges."""

_CHUNK_NOTE = "BatchNorm sees one chunk at a time"
_NOTES = {
    "PipeDream": "gradients at weights of up to P - 1 updates earlier, which are kept for them",
    "PipeDream-2BW": "gradients at weights of one update earlier; " + _CHUNK_NOTE,
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One contender, before it has run.

    Attributes:
        name: unique; see `results.Contender` for the attributes of the same names.
        engine: of this project; a pipeline of backpropagation has none of its own, and takes the default.
        schedule: of a pipeline of backpropagation, one of `SCHEDULES` or `ASYNCHRONOUS`.
        kernels: as `Trainer` takes them.
        compiled: every block goes through torch.compile.
        not_run: why it can't run on this machine; None: it can.
    """

    name: str
    family: str
    engine: Engine = field(default_factory=Sequential)
    schedule: str | None = None
    processes: int = 1
    threads: int = 1
    kernels: str = "auto"
    compiled: bool = False
    note: str = ""
    not_run: str | None = None

    @property
    def is_bp_pipeline(self) -> bool:
        return self.schedule is not None

    @property
    def engine_name(self) -> str:
        """What the report calls what it runs by."""
        return self.schedule or self.engine.name


def all_contenders(device: str, *, cores: int, processes: int, queue_depth: int = 4) -> list[Spec]:
    """All contenders in the order of the table; those that need another device say so in `not_run`.

    Args:
        device: cpu or cuda.
        cores: that a contender may use on a CPU; one process has 1 thread, and as many as that in a second form.
        processes: of the pipelines; they share the cores out.
        queue_depth: of the local rules' pipelines.
    """
    if device == "cuda":
        return _on_cuda(processes, queue_depth)
    threads = max(1, cores // processes)
    found = [_sequential("BP", 1)]
    if cores > 1:
        found.append(_sequential("BP", cores))
    found += [
        Spec(name=f"BP {form}", family="BP", not_run="no CUDA device") for form in ("in a CUDA graph", "compiled")
    ]
    found += [_schedule(name, processes, threads) for name in (*SCHEDULES, *ASYNCHRONOUS)]
    for rule in LOCAL_RULES:
        found.append(_sequential(rule, 1))
        if cores > 1:
            found.append(_sequential(rule, cores))
        found.append(
            Spec(
                name=f"{rule}, {processes} processes",
                family=rule,
                engine=Processes(
                    queue_depth=queue_depth, max_recoveries=0
                ),  # the meter lives in the process that trains
                processes=processes,
                threads=threads,
            )
        )
        found.append(Spec(name=f"{rule}, streams", family=rule, engine=Streams(queue_depth=queue_depth)))
    return found


def choose(specs: list[Spec], words: list[str]) -> list[Spec]:
    """Those whose names are, or begin with, one of the words, case aside; all without words.

    Raises:
        ValueError: a word fits no contender; lists the names.
    """
    if not words:
        return specs
    chosen = []
    for word in words:
        exact = [spec for spec in specs if spec.name.lower() == word.lower()]
        fits = exact or [spec for spec in specs if spec.name.lower().startswith(word.lower())]
        if not fits:
            names = "; ".join(spec.name for spec in specs)
            raise ValueError(f"--only {word!r} fits no contender; there are: {names}")
        chosen += fits
    return [spec for spec in specs if spec in chosen]


def _sequential(family: str, threads: int) -> Spec:
    plural = "s" if threads > 1 else ""
    return Spec(name=f"{family}, {threads} thread{plural}", family=family, threads=threads)


def _schedule(name: str, processes: int, threads: int, not_run: str | None = None) -> Spec:
    return Spec(
        name=f"BP {name}, {processes} processes",
        family="BP",
        schedule=name,
        processes=processes,
        threads=threads,
        note=_NOTES.get(name, _CHUNK_NOTE),
        not_run=not_run,
    )


def _on_cuda(processes: int, queue_depth: int) -> list[Spec]:
    count = torch.cuda.device_count()
    missing = None if count >= processes else f"needs {processes} CUDA devices, {count} found"
    graph = Streams(stages=1)  # the plain loop's one stage, recorded
    found = [
        Spec(name="BP eager", family="BP", kernels="torch"),
        Spec(name="BP in a CUDA graph", family="BP", engine=graph),
        Spec(name="BP compiled", family="BP", compiled=True, kernels="torch"),
        Spec(name="BP compiled, in a CUDA graph", family="BP", engine=graph, compiled=True),
        *(_schedule(name, processes, 1, missing) for name in SCHEDULES),
        *(_schedule(name, processes, 1, "on CPUs only") for name in ASYNCHRONOUS),
    ]
    for rule in LOCAL_RULES:
        found += [
            Spec(name=f"{rule} eager", family=rule, kernels="torch"),
            Spec(name=f"{rule} in a CUDA graph", family=rule, engine=graph),
            Spec(
                name=f"{rule}, {processes} processes",
                family=rule,
                engine=Processes(
                    queue_depth=queue_depth, max_recoveries=0
                ),  # the meter lives in the process that trains
                processes=processes,
                not_run=missing,
            ),
            Spec(name=f"{rule}, streams", family=rule, engine=Streams(queue_depth=queue_depth)),
        ]
    return found
