"""What a process asks of the machine that it runs on: cores, intra-op threads, memory."""

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterable, Iterator

import torch

__all__ = [
    "freed_memory_returned",
    "keep_freed_memory",
    "occupy_cores",
    "own_cores",
    "peak_memory_bytes",
    "set_threads",
    "threads_on",
]


def own_cores(index: int, count: int, available: Iterable[int] | None = None) -> list[int]:
    """The cores of process `index` of `count` on this machine: blocks of equal size of the `available` ones (default:
    those that this process may use).

    Blocks and not single cores, so that several runs on one large machine do not meet on the same few. Empty where
    there are fewer cores than processes, a single process, or no way to choose (macOS).
    """
    if available is None:
        available = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    if count < 2:
        return []
    cores = sorted(available)
    size = len(cores) // count
    return cores[index * size : (index + 1) * size]


def threads_on(cores: list[int]) -> int:
    """Intra-op threads that `occupy_cores` leaves this process; no cores: it may use all."""
    threads = torch.get_num_threads()
    return min(threads, len(cores)) if cores else threads


@contextlib.contextmanager
def occupy_cores(cores: list[int]) -> Iterator[None]:
    """Keeps the calling thread, and the intra-op threads that it starts inside, on `cores`; no more threads than those.
    What comes after, a further run for one, has the cores and threads of before.

    Threads that run already (heartbeats, the coordinator, what reads ahead) stay free to use a core that idles.
    """
    if not cores:
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads_on(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def set_threads(threads: int | None) -> None:
    """Intra-op threads of this process; None leaves torch's choice (OMP_NUM_THREADS, else one per core)."""
    if threads is not None:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next step, instead of giving it back and faulting it in again.

    Activations are a few megabytes, just what malloc maps and unmaps by default: page faults took 5 to 15 % of a
    step, and a third where a rule's own maps are of 64 MiB. The numbers are mallopt's parameters: M_TRIM_THRESHOLD and
    the largest value that is sensible; M_MMAP_MAX, which is 0, as M_MMAP_THRESHOLD ends at 32 MiB. So large blocks lie
    among the others, and gaps between them cost memory: little as long as all micro-batches have the same shapes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 1 << 30)
        mallopt(-4, 0)


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Afterwards the system has what was kept and is not in use (glibc's malloc_trim); the process would hold it."""
    try:
        yield
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB, macOS in bytes
