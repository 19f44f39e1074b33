"""Cores, threads and memory: what a process asks of its machine."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.runtime.machine import occupy_cores, own_cores

linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system does not let a process choose")


@given(available=st.integers(1, 70), count=st.integers(1, 9))
def test_processes_share_the_cores_without_overlap(available: int, count: int) -> None:
    shares = [own_cores(i, count, range(100, 100 + available)) for i in range(count)]
    taken = [core for share in shares for core in share]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(100, 100 + available))
    assert len({len(share) for share in shares}) == 1
    # A process alone, or with too few cores, is left where it is; else everyone has some and few are left over.
    assert (available - len(taken) < count) if 1 < count <= available else not taken


@linux
def test_only_the_calling_thread_is_kept_on_its_cores() -> None:
    whole = sorted(os.sched_getaffinity(0))
    seen: list[list[int]] = []

    def occupy() -> None:
        with occupy_cores(whole[:1]):
            seen.append(sorted(os.sched_getaffinity(0)))
        seen.append(sorted(os.sched_getaffinity(0)))

    worker = threading.Thread(target=occupy)
    worker.start()
    worker.join()
    assert seen == [whole[:1], whole]
    assert sorted(os.sched_getaffinity(0)) == whole


@linux
def test_a_run_gives_its_cores_and_threads_back() -> None:
    """Also one that fails: else every further run in the process would divide what the one before had left."""
    whole, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with contextlib.suppress(RuntimeError), occupy_cores(whole[:1]):
            assert torch.get_num_threads() == 1
            raise RuntimeError
        assert torch.get_num_threads() == 3
        assert sorted(os.sched_getaffinity(0)) == whole
    finally:
        torch.set_num_threads(threads)


@linux
@pytest.mark.parametrize("mebibytes", [8, 64])
def test_freed_memory_is_used_again(mebibytes: int) -> None:
    """Counts page faults in a process of its own: tensors that come and go cost one for each 4 KiB by default, and
    those above 32 MiB whatever malloc's largest threshold. The median of the rounds, for the heap may grow by one more
    tensor in one of them, where something small has come to lie in a gap."""
    program = f"""
import resource, statistics, torch
from unlocked.runtime.machine import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones({mebibytes} << 18) for _ in range(4)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(statistics.median(faults() for _ in range(13)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 500


@linux
def test_a_run_gives_back_the_memory_that_it_has_kept() -> None:
    """Resident memory of a process of its own, in MiB above that before the run."""
    program = """
import sys, torch
from pathlib import Path
from unlocked.rules import LocalRule
from unlocked.runtime import Trainer
from unlocked.models import small_conv
torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
class Greedy(LocalRule):
    size = 1
    def forward(self, activations, labels):
        return activations.square().mean() + 0 * torch.ones(self.size << 18).sum()
data = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
def fit(rule):
    Trainer(small_conv(in_channels=1, num_classes=2, image_size=8), rule=rule, optimizer=torch.optim.Adam).fit(
        data, epochs=1, batch_size=4)
fit(Greedy)  # which imports what a run needs
before, Greedy.size = resident(), 100
fit(Greedy)
print(resident() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 50


def test_threads_are_set_for_a_run() -> None:
    before = torch.get_num_threads()
    data = torch.randn(8, 1, 8, 8), torch.arange(8) % 2
    model = small_conv(in_channels=1, num_classes=2, image_size=8)
    try:
        Trainer(model, rule=LLS(), optimizer=torch.optim.Adam, threads=2).fit(data, epochs=1, batch_size=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_no_threads_are_refused() -> None:
    model = small_conv(in_channels=1, num_classes=2, image_size=8)
    with pytest.raises(ValueError, match=r"threads is 0; .*at least 1"):
        Trainer(model, rule=LLS(), optimizer=torch.optim.Adam, threads=0)
