"""What no restart of a worker can mend: a supervisor, or the process that it forks workers from, dies or stands still.
The run ends by name, within seconds, and nothing is left; `--resume auto` goes on from its last snapshot."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, PIPELINE, children_of, first_error, free_port, ranks, worker_of

from unlocked.comparison.chaos.tree import Process, cut_connection
from unlocked.runtime.control.zygote import CAN_FORK
from unlocked.runtime.faults import VARIABLE

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not CAN_FORK, reason="workers have no supervisors here")]

FLAGS = [
    "--dataset",
    "synthetic",
    "--num-epochs",
    "1000",
    "--plain",
    "--no-eval",
    "--print-freq",
    "2",
    "--timeout",
    "6",
]
SECONDS = 15  # in which everybody must be gone: measured, it is one to eight, but machines may be loaded
ALL = int(os.environ.get("UNLOCKED_KILLS", "3")) >= 20  # for the long check
VICTIMS = (0, 1) if ALL else (1,)


def run_until(folder: Path, started: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Until it trains; the workers."""
    log = folder / "run" / "train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "Epoch: [0]" in log.read_text()):
        assert time.monotonic() < deadline, "the run did not begin"
        time.sleep(0.05)
    return [worker_of(process.pid) for process in started]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def words_of(started: Sequence[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=SECONDS)[1] for process in started]


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_end_of_what_workers_are_forked_from_is_named(victim: int, how: str, tmp_path: Path) -> None:
    with ranks(2, [str(PIPELINE), *FLAGS, "--save-path", str(tmp_path), "--experiment-name", "run"]) as started:
        workers = run_until(tmp_path, started)
        [zygote] = children_of(started[victim].pid)
        if how == "killed":
            os.kill(zygote, signal.SIGKILL)
        else:  # of which nobody hears before it is needed
            os.kill(zygote, signal.SIGSTOP)
            os.kill(workers[victim], signal.SIGKILL)
        texts = words_of(started)
    assert [process.returncode for process in started] == [1, 1], texts
    assert f"stage {victim} (rank {victim}: " in first_error(texts[0]), texts
    expected = "its worker ended with the process that it is forked from" if how == "killed" else "is lost"
    assert expected in first_error(texts[0]), texts
    assert not any(map(lives, [zygote, *workers]))


@pytest.mark.parametrize("victim", (0, 1) if ALL else (0,))
def test_a_supervisor_that_stands_still_is_named_and_ends_when_it_goes_on(victim: int, tmp_path: Path) -> None:
    with ranks(2, [str(PIPELINE), *FLAGS, "--save-path", str(tmp_path), "--experiment-name", "run"]) as started:
        workers = run_until(tmp_path, started)
        started[victim].send_signal(signal.SIGSTOP)
        other = started[1 - victim].communicate(timeout=SECONDS)[1]
        assert started[1 - victim].returncode == 1
        assert f"stage {victim} (rank {victim}: " in first_error(other), other
        started[victim].send_signal(signal.SIGCONT)
        started[victim].communicate(timeout=SECONDS)
        assert started[victim].returncode == 1
        assert not any(map(lives, workers))


def test_a_worker_that_loses_the_coordinator_alone_is_replaced(tmp_path: Path) -> None:
    port = free_port()
    flags = [*FLAGS, "--save-path", str(tmp_path), "--experiment-name", "run", "--coordinator-port", str(port)]
    with ranks(2, [str(PIPELINE), *flags]) as started:
        workers = run_until(tmp_path, started)
        process = Process(workers[1], started[1].pid, 1)
        try:
            assert cut_connection(process, random.Random(0), port)
        except OSError as error:
            pytest.skip(f"this system does not let a connection be cut: {error}")
        log, deadline = tmp_path / "run" / "train.log", time.monotonic() + 60
        while not re.search("its worker lost its connection.*; the next one began", log.read_text()):
            assert all(one.poll() is None for one in started), words_of(started)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started[0].send_signal(signal.SIGINT)
        texts = words_of(started)
    assert [one.returncode for one in started] == [130, 130], texts


@pytest.mark.parametrize("whose", ["both", "the supervisor's"] if ALL else ["both"])
@pytest.mark.parametrize("still", [0, 1])
def test_a_supervisor_whose_connection_breaks_makes_it_anew(still: int, whose: str, tmp_path: Path) -> None:
    """Stage 1's connections are cut while its worker stands still, or while it has nothing to do because stage 0's
    does: the run can't end before, as somebody stands still until he is killed."""
    port = free_port()
    job = ["--dataset", "digits", "--batch-size", "100", "--num-epochs", "5", "--plain", "--timeout", "6"]
    alone = [sys.executable, str(PIPELINE), *job, "--summary", str(tmp_path / "alone.json")]
    plain = subprocess.Popen([*alone, "--engine", "sequential"], env=ENVIRONMENT)
    flags = ["--save-path", str(tmp_path), "--experiment-name", "run", "--coordinator-port", str(port)]
    flags += ["--summary", str(tmp_path / "run.json"), "--print-freq", "2"]
    faults = {VARIABLE: f"stop@{still}F12"}
    with ranks(3, [str(PIPELINE), *job, *flags], environment=faults) as started:
        workers = run_until(tmp_path, started)
        victim, deadline = Process(workers[1], started[1].pid, 1), time.monotonic() + 60
        while Process(workers[still], started[still].pid, still).state != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for process in [Process(started[1].pid, 0, 1)] + [victim] * (whose == "both"):
            try:
                assert cut_connection(process, random.Random(0), port)
            except OSError as error:
                pytest.skip(f"this system does not let a connection be cut: {error}")
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert [one.returncode for one in started] == [0, 0, 0], texts
    assert plain.wait(60) == 0
    run, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "alone"))
    assert run["weights_sha256"] == expected["weights_sha256"]
    replaced = {still} | {1} if whose == "both" else {still}
    assert {one["stage"] for one in run["recoveries"]} == replaced, "the supervisor was told to start another worker"
