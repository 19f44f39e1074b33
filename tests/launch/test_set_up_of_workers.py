"""Set-up behind a supervisor: whose worker dies there is named at once, or, where all have come, replaced."""

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import PIPELINE, first_error, let_pass, ranks, worker_of

from unlocked.runtime.control.zygote import CAN_FORK

pytestmark = [pytest.mark.alone, pytest.mark.skipif(not CAN_FORK, reason="workers have no supervisors here")]

ENDLESS = [str(PIPELINE), "--dataset", "synthetic", "--num-epochs", "1000", "--plain", "--no-eval"]
SLOW_WORKER = str(Path(__file__).with_name("slow_worker.py"))
SECONDS = 15  # in which everybody must be gone: measured, it is three to six, but machines may be loaded


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_before_all_have_come_is_named_on_every_rank(number: signal.Signals) -> None:
    """Rank 2 never comes; the others' main threads wait for it."""
    command = [*ENDLESS, "--transport", "group", "--timeout", "6"]
    with ranks(3, command, only=[0, 1]) as started:
        victim = worker_of(started[1].pid)
        worker_of(started[0].pid)
        os.kill(victim, number)
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], texts
    assert all("stage 1 (rank 1: " in first_error(text) for text in texts), texts
    hows = ["its worker was ended by SIGKILL"]
    if number == signal.SIGSTOP:
        hows = ["no heartbeat for 3 s", "its worker did not report within 3 s"]
    assert all(any(how in first_error(text) for how in hows) for text in texts), texts


def test_a_worker_killed_while_another_one_builds_comes_back(tmp_path: Path) -> None:
    with ranks(2, [SLOW_WORKER, str(tmp_path)]) as started:
        deadline = time.monotonic() + 60
        while not (tmp_path / "building-0").exists() or not (tmp_path / "building-1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        let_pass(2.0, started)  # all have said hello, and every supervisor has heard of it
        victim = worker_of(started[1].pid)
        os.kill(victim, signal.SIGKILL)
        while worker_of(started[1].pid) == victim:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "go").touch()
        texts = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert (tmp_path / "recoveries").read_text() == "[(1, 1, 'was ended by SIGKILL')]"
