"""What a device reaches, timed once per process: a matrix product in both precisions, and a copy."""

import statistics
import time
from collections.abc import Callable
from functools import lru_cache

import torch

__all__ = ["PAYS", "bfloat16_gain", "copy_rate", "product_rate"]

PAYS = 1.2
"""The gain of a product from which a step gains as well: what surrounds the products moves fewer bytes at best."""
_SIZE = 512  # a quarter of a GFLOP: milliseconds in float32 on any core, and beyond what a call costs
_REPEATS = 7


@lru_cache
def bfloat16_gain(device: str) -> float:
    """How many times as fast a product of two 512 x 512 matrices is in bfloat16 as in float32: the ratio of medians of
    seven turns. Below 1 on a processor that has no unit for it.

    Raises:
        RuntimeError: there is no such device.
    """
    place = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    single = torch.randn(_SIZE, _SIZE, generator=generator).to(place)
    half = single.bfloat16()
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(_REPEATS + 1):  # the first turn loads and chooses kernels
        for matrix in (single, half):
            began = _now(place)
            _ = matrix @ matrix
            seconds[matrix.dtype].append(_now(place) - began)
    single_time, half_time = (statistics.median(times[1:]) for times in seconds.values())
    return single_time / half_time


@lru_cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two 1024 x 1024 matrices; the best of five."""
    matrix = torch.ones(1024, 1024, dtype=dtype, device=device)
    return 2 * 1024**3 / _best(device, lambda: matrix @ matrix)


@lru_cache
def copy_rate(device: str) -> float:
    """Bytes per second that a copy of 64 MiB reads and writes; the best of five."""
    source = torch.ones(1 << 24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(device, lambda: target.copy_(source))


def _best(device: str, call: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        began = _now(torch.device(device))
        call()
        times.append(_now(torch.device(device)) - began)
    return min(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
