"""Timing of short GPU work: captured in CUDA graphs, replayed in turns, read by events; and the card's two ceilings."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from unlocked.comparison.environment import environment as describe
from unlocked.runtime.typed import to_plain

__all__ = ["Captured", "Sample", "capture", "ceilings", "environment", "measure_in_turns"]

_TARGET_US = 300.0  # a graph holds about so much work, so that its launch does not count


@dataclass
class Captured:
    """One contender's work, `calls` of it in one graph."""

    name: str
    graph: torch.cuda.CUDAGraph
    calls: int
    keep: Any
    """Whatever the graph reads and writes: it must outlive the graph."""


@dataclass(frozen=True)
class Sample:
    """Microseconds per call: the median of the replays, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    replays: int
    calls: int = field(default=1)


def capture(name: str, calls: Sequence[Callable[[], Any]], stream: torch.cuda.Stream) -> Captured:
    """One graph of `calls`, one per set of buffers, repeated until it holds some hundred microseconds of work.

    Every call runs three times outside of the graph first, on the stream that is captured: libraries choose their
    algorithms, kernels are compiled, and a lazily built autograd graph belongs to that stream.
    """
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
        stream.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
    each = 1e3 * start.elapsed_time(end) / len(calls)  # with the host's time, so an upper bound
    rounds = max(1, min(8, round(_TARGET_US / max(each, 1.0) / len(calls))))
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(rounds):
            results = [call() for call in calls]
    return Captured(name, graph, rounds * len(calls), (list(calls), results))


def measure_in_turns(contenders: Sequence[Captured], stream: torch.cuda.Stream, replays: int) -> dict[str, Sample]:
    """Replays all graphs in turns, so that a drifting clock favours nobody. Events stand around each replay."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(replays + 2):
        pairs = []
        with torch.cuda.stream(stream):
            for contender in contenders:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                contender.graph.replay()
                end.record()
                pairs.append((contender, start, end))
        stream.synchronize()
        if turn < 2:  # warm-up
            continue
        for contender, start, end in pairs:
            times[contender.name].append(1e3 * start.elapsed_time(end) / contender.calls)
    samples = {}
    for contender in contenders:
        found = sorted(times[contender.name])
        fifths = statistics.quantiles(found, n=5) if len(found) > 1 else [found[0]] * 4
        samples[contender.name] = Sample(
            statistics.median(found), fifths[0], fifths[3], len(found), calls=contender.calls
        )
    return samples


def ceilings(*, quick: bool = False) -> dict[str, float]:
    """What this card reaches, measured now: copy in bytes/s (read plus written), matrix products in flop/s.

    On random data: a product of zeros runs faster than one of anything else.
    """
    stream = torch.cuda.Stream()
    gib = 1 if quick else 2
    source = torch.empty(gib << 28, device="cuda").normal_()
    target = torch.empty_like(source)
    found = {"copy": 2 * 4 * source.numel() / _seconds(partial(target.copy_, source), stream)}
    source = target = torch.empty(0)
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32, side in (
        ("bf16", torch.bfloat16, False, 8192),
        ("tf32", torch.float32, True, 8192),
        ("fp32", torch.float32, False, 4096),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        found[name] = 2 * side**3 / _seconds(partial(torch.mm, a, b, out=out), stream)
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()
    return found


def _seconds(call: Callable[[], Any], stream: torch.cuda.Stream, repeats: int = 12) -> float:
    times = []
    with torch.cuda.stream(stream):
        for turn in range(repeats + 3):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 3:
                times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """What a result needs to be understood later, as plain data, and the sizes that a kernel's speed hangs on."""
    properties = torch.cuda.get_device_properties(0)
    return to_plain(describe()) | {
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }
