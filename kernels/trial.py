"""Whether bfloat16 pays on a processor: a matrix product in both precisions, timed once per process and device."""

import statistics
import time
from functools import lru_cache

import torch

__all__ = ["PAYS", "bfloat16_gain"]

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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
