"""What the processes engine can be told, and what follows from it on every rank."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlocked.runtime.control.messages import PROTOCOL_VERSION
from unlocked.runtime.engines.pipeline import PipelineOptions
from unlocked.runtime.engines.processes.links import TRANSPORTS
from unlocked.runtime.fields import LONGEST_WAIT, setting
from unlocked.runtime.job import Job
from unlocked.runtime.saving.identity import differences
from unlocked.workers.edges import SlotLayout
from unlocked.workers.slot_log import SlotLog

__all__ = ["MOST_SLOTS", "ProcessesOptions", "check_same_settings", "heartbeat_timeout", "log_slots", "settings_of"]

MOST_SLOTS = 1024
"""Of an edge's log: stages save themselves more often than that."""
_HEARTBEAT_SECONDS = 30.0  # of silence, after which a process counts as lost


@dataclass(frozen=True, kw_only=True)
class ProcessesOptions(PipelineOptions):
    """How processes find each other and move activations."""

    transport: str = setting(
        "auto",
        "between processes: auto, shared (memory of one machine, or of one GPU) or group (Gloo, NCCL)",
        choices=TRANSPORTS,
    )
    pin: bool = setting(
        True,
        "keep each of a machine's processes on cores of its own (on a CPU)",
        off="let processes of one machine share its cores freely",
    )
    placement: Path | None = setting(
        None,
        "a JSON file of what layers and links take, measured, and the stages that were chosen: read where it is there, "
        "so that this run is cut as the one that wrote it; else written",
        place="JSON file",
    )
    start_timeout: float = setting(
        120.0,
        "seconds that all processes may take to appear, build their stages and connect",
        above=0,
        at_most=LONGEST_WAIT,
    )
    coordinator_port: int = setting(
        0, "port of the coordinator, in rank 0 (0: any free one)", at_least=0, at_most=65535
    )
    max_recoveries: int = setting(
        100,
        "workers within an hour that die by a signal and are replaced, while the others go on (0: the first ends the "
        "run)",
        at_least=0,
        at_most=1_000_000,
    )
    log_bytes: int = setting(
        256 << 20,
        "memory of each edge for what a worker that is replaced reads again; the less, the more often stages save "
        "themselves",
        at_least=0,
        at_most=1 << 40,
    )


def settings_of(job: Job, options: ProcessesOptions) -> dict[str, Any]:
    """What must be the same on all ranks, as JSON gives it back."""
    settings = {
        **job.fingerprint,
        **job.rates,
        "length of the stream": len(job.plan),
        "first position": job.start,
        "queue_depth": options.queue_depth,
        "transport": options.transport,
        "max_recoveries": options.max_recoveries,
        "device": job.device.type,
        "release": f"{sys.modules['unlocked'].__version__}, protocol {PROTOCOL_VERSION}",
    }
    return dict(json.loads(json.dumps(settings, allow_nan=False)))


def check_same_settings(rank: int, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raises: ValueError: one line with all in which this rank differs from rank 0: flags, data, release."""
    wrong = [f"{name} is {own} in rank {rank} and {its} in rank 0" for name, own, its in differences(mine, theirs)]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}; start all ranks with the same flags, data and release")


def log_slots(job: Job, options: ProcessesOptions, layout: SlotLayout) -> int:
    """Micro-batches that an edge keeps for a worker that is replaced: one more at least than its neighbour may be
    ahead, and no more than the run has."""
    wanted = min(options.log_bytes // SlotLog.slot_bytes(layout), len(job.plan) - job.start, MOST_SLOTS)
    return max(wanted, options.queue_depth + 2)


def heartbeat_timeout(job: Job) -> float:
    """Half of what a stage waits for its neighbour, at most: a process that stands still is missed by the coordinator,
    which knows its name, before a stage that waits for another one that waits for it gives up."""
    return min(_HEARTBEAT_SECONDS, job.settings.timeout / 2)
