"""What a run of very many ranks asks of the store at which they meet, and of rank 0's process."""

import resource
import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta

import pytest
import torch.distributed as dist

from unlocked.runtime.control.ledger import Ledger
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import gather

RANKS = 24


class Counting(dist.PrefixStore):
    """A real store that counts the keys which each request names."""

    asked: "Counter[str]"
    server: dist.TCPStore

    def check(self, keys: list[str]) -> bool:  # type: ignore[override]
        self.asked["keys"] += len(keys)
        return super().check(keys)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        self.asked["keys"] += 1
        return super().get(key)


def world(rank: int, size: int = RANKS) -> World:
    return World(rank=rank, size=size, local_rank=rank, local_size=size, master_address="127.0.0.1", master_port=1)


@pytest.fixture(scope="module")
def stores() -> list[Counting]:
    """A connection of each rank to one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = []
    for _ in range(RANKS):
        client = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False, timeout=timedelta(seconds=20))
        one = Counting("run", client)
        one.asked, one.server = Counter(), server
        made.append(one)
    return made


def test_what_all_ranks_say_reaches_all_of_them(stores: list[Counting]) -> None:
    heard: list[list[str]] = [[] for _ in range(RANKS)]
    pauses = [0] * RANKS

    def come(rank: int) -> None:
        def pause(_: float) -> None:
            pauses[rank] += 1

        heard[rank] = gather(stores[rank], world(rank), "threads", f"of {rank}", 20.0, pause)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == [[f"of {rank}" for rank in range(RANKS)]] * RANKS
    # One key in each look and one at the end; only the last to come asks for those of all.
    looks = [pauses[rank] + 2 for rank in range(RANKS)]
    asked = [store.asked["keys"] for store in stores]
    assert sorted(a > look for a, look in zip(asked, looks, strict=True)) == [False] * (RANKS - 1) + [True]


def test_who_does_not_come_is_named(stores: list[Counting]) -> None:
    for rank, missing in ((0, "stage 1, stage 2"), (2, "stage 1")):
        with pytest.raises(TimeoutError, match=f"^built: {missing} did not come within 0.01 s$"):
            gather(stores[rank], world(rank, 3), "built", "", 0.01, names=["stage 0", "stage 1", "stage 2"])


def test_a_ledger_of_many_snapshots_does_not_grow() -> None:
    """A thousand stages that save themselves every five minutes would fill a gigabyte in a week."""
    ledger = Ledger(2)
    for position in range(1, 500):
        for stage in range(2):
            done = ledger.snapshot(stage, position, {f"layer{stage}": (position, "ab")})
            assert (done is None) is (stage == 0)
            assert ledger.saved(stage) == position
    assert ledger._snapshots == {}
    assert ledger.snapshot(1, 7, {"layer1": (7, "ab")}) is None, "a worker that does a dead one's work says it again"
    assert ledger._snapshots == {}
    assert ledger.saved(1) == 499


FILES = """
import resource
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.control.entrance import most_connections
soft, hard = {limits}
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
with Coordinator([("layer",)] * {stages}, 5):
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - most_connections({stages}))
"""


@pytest.mark.parametrize(
    ("stages", "limits", "left"),
    [
        (1024, (1024, 16384), 3 * 1024 + 256 + 4096),
        (1024, (1024, 5000), 5000 - 4 * 1024 - 64),
        (2, (1024, 1024), 1024 - 72),
    ],
    ids=["as many as wanted", "as many as there are", "enough"],
)
def test_rank_0_may_open_a_file_for_every_connection_of_every_rank(
    stages: int, limits: tuple[int, int], left: int
) -> None:
    """Those to the coordinator alone take what a process may have by default."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < limits[1]:
        pytest.skip("this machine allows fewer")
    script = FILES.format(stages=stages, limits=limits)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) == left
