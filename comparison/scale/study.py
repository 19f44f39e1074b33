"""Pipelines of very many equal stages on links that are given, with failures at a rate that is given: the numbers.

Nothing here is measured but what says so. A node is a stage. One transfer at a time goes over a link, as the engine's
edges have it, so a link's latency counts against its rate.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from unlocked.comparison.scale.failures import daly_interval, effective_share
from unlocked.comparison.scale.traffic import coordinator_traffic
from unlocked.runtime.engines.processes.memory_saver import FULL_LOG, save_interval
from unlocked.runtime.engines.processes.options import MOST_SLOTS, ProcessesOptions
from unlocked.runtime.fields import check, setting
from unlocked.runtime.schedules.simulate import transfer_seconds
from unlocked.runtime.schedules.wide import ASYNCHRONOUS, LOCAL, WIDE, Seconds, WideTimes, simulate_wide
from unlocked.runtime.settings import Settings

__all__ = ["SCHEDULES", "Assumptions", "Link", "study"]

SCHEDULES: Final = tuple(name for name in WIDE if name != "GPipe")  # whose bubble is that of 1F1B
_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Link:
    """Between two stages.

    Attributes:
        latency: seconds.
        bandwidth: bytes per second.
    """

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is put in."""

    forward: float = setting(0.01, "seconds of a stage's forward pass", above=0, at_most=1e6)
    backward: float = setting(0.01, "of the gradient at its input", above=0, at_most=1e6)
    weights: float = setting(0.01, "of its weights' gradients", above=0, at_most=1e6)
    head: float = setting(
        0.0005, "of a local head, which comes on top of the weights' gradients", at_least=0, at_most=1e6
    )
    activation_bytes: int = setting(1 << 20, "of a micro-batch between two stages", at_least=1, at_most=1 << 40)
    queue_depth: int = setting(2, "slots of an edge of local learning", at_least=1, at_most=1 << 20)
    rounds: int = setting(2, "micro-batches of a step of backpropagation, in stages", at_least=1, at_most=64)
    save: float = setting(2.0, "seconds in which a snapshot of all stages keeps them", above=0, at_most=1e6)
    restart: float = setting(120.0, "seconds until all processes work again", at_least=0, at_most=1e6)
    own_save: float = setting(0.02, "seconds in which its own snapshot in memory keeps a stage", above=0, at_most=1e6)
    own_restart: float = setting(1.0, "seconds until a stage's next worker works", at_least=0, at_most=1e6)

    def __post_init__(self) -> None:
        check(self)


def study(
    assumptions: Assumptions, stages: Sequence[int], links: Sequence[Link], mtbf_days: Sequence[float]
) -> dict[str, Any]:
    """All tables' rows, as plain data.

    Args:
        mtbf_days: mean days from one failure of a node to the next.
    """
    times = {
        (count, link.name, name): _simulated(assumptions, name, count, link)
        for count in stages
        for link in links
        for name in SCHEDULES
    }
    return {
        "assumptions": asdict(assumptions),
        "links": [asdict(link) for link in links],
        "throughput": [_row(assumptions, *key, found) for key, found in times.items()],
        "failures": [
            _failures(assumptions, count, days, {name: times[count, links[0].name, name] for name in SCHEDULES})
            for count in stages
            for days in mtbf_days
        ],
        "memory": [
            _memory(assumptions, count, link, times[count, link.name, LOCAL]) for count in stages for link in links
        ],
        "coordinator": [_coordinator(assumptions, count, times[count, links[0].name, LOCAL]) for count in stages],
    }


def _simulated(assumptions: Assumptions, name: str, stages: int, link: Link) -> WideTimes:
    seconds = Seconds(
        forward=assumptions.forward,
        update=assumptions.weights + assumptions.head,
        backward=assumptions.backward,
        weights=assumptions.weights,
        transfer=transfer_seconds(assumptions.activation_bytes, latency=link.latency, bandwidth=link.bandwidth),
    )
    microbatches = max(assumptions.rounds, 4 if name == LOCAL else 1) * stages
    return simulate_wide(name, stages, seconds, microbatches=microbatches, queue_depth=assumptions.queue_depth)


def _row(assumptions: Assumptions, stages: int, link: str, name: str, times: WideTimes) -> dict[str, Any]:
    # A stage's activations from its forward pass to their last use: stage 0 keeps most.
    kept = assumptions.queue_depth + 2 if name == LOCAL else min(stages, assumptions.rounds * stages)
    return {
        "stages": stages,
        "link": link,
        "schedule": name,
        "microbatches_per_second": times.throughput,
        "busy": times.busy,
        "fill_seconds": times.fill,
        "drain_seconds": times.drain,
        "kept_microbatches": kept,
        "weight_versions": 2 if name == ASYNCHRONOUS else 1,
    }


def _failures(assumptions: Assumptions, stages: int, days: float, times: dict[str, WideTimes]) -> dict[str, Any]:
    mtbf = days * _DAY / stages
    together = daly_interval(assumptions.save, mtbf)
    alone = own_interval(assumptions, times[LOCAL].period)
    shares = {
        "all_go_back": effective_share(assumptions.save, mtbf, assumptions.restart, together),
        "stage_goes_back": effective_share(assumptions.own_save, mtbf, assumptions.own_restart, alone),
    }
    rates = {name: found.throughput * shares["all_go_back"] for name, found in times.items()}
    return {
        "stages": stages,
        "mtbf_days": days,
        "hours_between_failures": mtbf / 3600,
        "save_every_seconds": together,
        "own_save_every_seconds": alone,
        **shares,
        "microbatches_per_second": rates | {"local, stage alone": times[LOCAL].throughput * shares["stage_goes_back"]},
    }


def own_interval(assumptions: Assumptions, period: float) -> float:
    """Seconds between two snapshots of a stage in memory, by the runtime's own rule: a hundredth of the time at most,
    and before the log is full."""
    by_time = save_interval(assumptions.own_save, Settings.timeout)
    return min(by_time, FULL_LOG * log_slots(assumptions.activation_bytes) * period)


def log_slots(activation_bytes: int) -> int:
    """Micro-batches that an edge keeps for a worker that begins again, by default."""
    return max(1, min(MOST_SLOTS, ProcessesOptions.log_bytes // activation_bytes))


def _memory(assumptions: Assumptions, stages: int, link: Link, times: WideTimes) -> dict[str, Any]:
    slots = log_slots(assumptions.activation_bytes)
    needed = min(slots, max(assumptions.queue_depth + 2, round(own_interval(assumptions, times.period) / times.period)))
    return {
        "stages": stages,
        "link": link.name,
        "slots": slots,
        "bytes_per_edge": slots * assumptions.activation_bytes,
        "bytes": slots * assumptions.activation_bytes * (stages - 1),
        "covers_seconds": slots * times.period,
        "own_save_every_seconds": own_interval(assumptions, times.period),
        "used_bytes_per_edge": needed * assumptions.activation_bytes,
    }


def _coordinator(assumptions: Assumptions, stages: int, times: WideTimes) -> dict[str, Any]:
    traffic = coordinator_traffic(stages, times.throughput, queue_depth=assumptions.queue_depth)
    return {"stages": stages, **asdict(traffic), "bytes_per_day": _DAY * traffic.bytes_per_second}
