"""Law 5 before the run has begun: a signal, a death or a launcher's end is felt at once and named by everybody."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import PIPELINE, first_error, let_pass, ranks, torchrun

from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.presence import Presence, lost_in_set_up
from unlocked.runtime.control.world import World

KILLS = int(os.environ.get("UNLOCKED_KILLS", "3"))  # 20 for the long check
ENDLESS = [str(PIPELINE), "--dataset", "synthetic", "--num-epochs", "1000", "--plain", "--no-eval"]
EXIT_WORKER = str(Path(__file__).with_name("exit_worker.py"))
SECONDS = 10  # in which everybody must be gone: measured, it is one, but machines may be loaded


def lock_of(folder: Path, rank: int) -> Path | None:
    return next(iter(folder.glob(f"unlocked-presence-*/*/rank-{rank}")), None)


def await_lock(folder: Path, rank: int) -> None:
    """Until the process has come to its first line. Before, only its launcher can know of it."""
    deadline = time.monotonic() + 60
    while lock_of(folder, rank) is None:
        assert time.monotonic() < deadline, f"rank {rank} never came"
        time.sleep(0.01)


@pytest.mark.alone
@pytest.mark.parametrize("number", range(KILLS))
def test_a_worker_killed_in_set_up_ends_all_and_is_named(number: int, tmp_path: Path) -> None:
    chance = random.Random(number)
    size = 2 + number % 2
    victim = chance.randrange(size)
    with ranks(size, ENDLESS, environment={"TMPDIR": str(tmp_path)}) as started:
        await_lock(tmp_path, victim)
        let_pass(chance.uniform(0.0, 6.0), started)
        started[victim].kill()
        began = time.monotonic()
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
        print(f"victim {victim} of {size}: gone after {time.monotonic() - began:.2f} s")
    others = {rank: text for rank, text in enumerate(texts) if rank != victim}
    assert all(started[rank].returncode == 1 for rank in others), texts
    # Where the run has begun by then, rank 0 alone tells, or all if rank 0 is the one.
    named = [first_error(text) for text in others.values() if first_error(text)]
    assert named
    assert all(f"stage {victim} (rank {victim}: " in line for line in named), texts
    if any("set-up" in line for line in named):
        assert len(named) == size - 1, texts


@pytest.mark.alone
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_lone_rank_0_at_once(number: signal.Signals, code: int, tmp_path: Path) -> None:
    with ranks(2, ENDLESS, only=[0], environment={"TMPDIR": str(tmp_path)}) as [process]:
        await_lock(tmp_path, 0)
        let_pass(3.0 if number == signal.SIGINT else 0.5, [process])  # in the wait for rank 1, and in an import
        process.send_signal(number)
        text = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == code, text
    assert first_error(text) == f"error: stage 0 (rank 0: layers unknown) was ended by {number.name} during set-up"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("where", "victim", "words"),
    [
        ("script", 0, ["stage 0 (rank 0: ", "ended during set-up"]),
        ("costs", 0, ["layer conv2 failed while its cost was measured: it called sys.exit(0)"]),
        ("run", 1, ["stage 1 (rank 1: ", "failed in 1F", "it called sys.exit(0)"]),
    ],
)
def test_who_leaves_with_code_0_is_named(where: str, victim: int, words: list[str]) -> None:
    with ranks(2, [EXIT_WORKER, where, str(victim)]) as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
    assert started[1 - victim].returncode == 1, texts
    if where != "script":
        assert started[victim].returncode == 1, texts
    told = [line for text in texts for line in text.splitlines() if all(word in line for word in words)]
    assert told, texts


@pytest.mark.alone
@pytest.mark.parametrize("seconds", [1.0, 9.0])
def test_the_launchers_death_takes_its_workers_along(seconds: float) -> None:
    """In set-up, and in the run."""
    with torchrun(2, ENDLESS) as process:
        deadline = time.monotonic() + 60
        while len(workers := children_of(process.pid)) < 2:
            assert time.monotonic() < deadline
        let_pass(seconds, [process])
        process.kill()
        process.wait()
        began = time.monotonic()
        while any(map(is_alive, workers)):
            assert time.monotonic() - began < SECONDS, "a worker outlives its launcher"
        print(f"gone after {time.monotonic() - began:.2f} s")


GATE = """
import os, time
while "RANK" in os.environ and not os.path.exists(os.environ["GATE"]):
    time.sleep(0.01)
"""


@pytest.mark.alone
def test_our_own_launchers_death_before_its_workers_run_any_code(tmp_path: Path) -> None:
    """They would meet without it, and train on."""
    command = [sys.executable, "-m", "unlocked", "train", "--stages", "2", *ENDLESS[1:]]
    told, gate = tmp_path / "told", tmp_path / "gate"
    (tmp_path / "sitecustomize.py").write_text(GATE)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TMPDIR": str(tmp_path), "GATE": str(gate), "PYTHONPATH": path}
    with told.open("w") as errors:
        launcher = subprocess.Popen(command, stderr=errors, env=environment)
    deadline = time.monotonic() + 60
    while len(workers := children_of(launcher.pid)) < 2:
        assert time.monotonic() < deadline
    launcher.kill()
    launcher.wait()
    gate.touch()
    try:
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline + 60, "a worker outlives its launcher"
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
    assert f"the launcher (process {launcher.pid}) is gone, and its workers end with it" in told.read_text()


def children_of(parent: int) -> list[int]:
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in map(str.split, listing.splitlines()) if int(of) == parent]


def is_alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


JOIN = """
import sys
from unlocked.runtime.control.ending import Verdict
from unlocked.runtime.control.presence import Presence
from unlocked.runtime.control.world import World
presence = Presence.join(World(int(sys.argv[1]), 2, 0, 2, "127.0.0.1", 7))
if sys.argv[2:]:
    presence.leave_word(Verdict(sys.argv[2], 2))
print("here", flush=True)
input()
"""


def joined(rank: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOIN, str(rank), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.fixture
def presence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Presence:
    """Rank 0's, in a folder of the test's."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    found = Presence.join(World(0, 2, 0, 2, "127.0.0.1", 7))
    assert found is not None
    return found


def test_a_peer_is_missed_when_it_has_ended_and_not_before(presence: Presence) -> None:
    with joined(1) as peer:
        assert presence.look() is None
        peer.kill()
        peer.wait()
        assert presence.look() == lost_in_set_up(1, peer.pid)


def test_a_peer_that_leaves_a_word_is_quoted(presence: Presence) -> None:
    with joined(1, "no such dataset") as peer:
        assert presence.look() is None
        peer.communicate("\n")
        assert presence.look() == Verdict("no such dataset", 2)


def test_a_second_process_of_a_rank_is_refused(presence: Presence) -> None:
    with joined(1) as peer:
        with pytest.raises(ValueError, match="rank 1 of this run is there already"):
            Presence.join(World(1, 2, 1, 2, "127.0.0.1", 7))
        peer.kill()


def test_a_peer_that_came_and_went_before_is_missed_too(presence: Presence) -> None:
    """In a script the lock is taken late, and by one process later than by the other."""
    with joined(1) as peer:
        peer.communicate("\n")
    again = Presence.join(World(0, 2, 0, 2, "127.0.0.1", 7))
    assert again is not None
    assert again.look() == lost_in_set_up(1, peer.pid)


def test_what_an_earlier_run_has_left_is_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, presence: Presence
) -> None:
    with joined(1) as peer:
        peer.kill()
        peer.wait()
    left = lock_of(tmp_path, 1)
    assert left is not None
    left.write_text(left.read_text().replace('"since": ', '"since": -'))  # long ago
    again = Presence.join(World(0, 2, 0, 2, "127.0.0.1", 7))
    assert again is not None
    assert again.look() is None
