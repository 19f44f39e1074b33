"""A stage that stands still while its worker's heartbeats go on: its neighbour ends the run within a stated time."""

import time
from pathlib import Path

import pytest
from ranks import ranks

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("stalled_worker.py"))
TIMEOUT, ROUNDS, MARGIN = 6.0, 2, 15.0


def test_a_neighbour_over_a_group_gives_up(tmp_path: Path) -> None:
    with ranks(2, [WORKER, str(tmp_path), str(TIMEOUT)]) as started:
        texts = [process.communicate(timeout=90)[1] for process in started]
        ended = time.time()
    assert [process.returncode for process in started] == [1, 1], texts
    seconds = ended - (tmp_path / "stalled").stat().st_mtime
    assert ROUNDS * TIMEOUT * 0.9 < seconds < ROUNDS * TIMEOUT + MARGIN
    words = ["stage 0 (rank 0: conv1, conv2) handed nothing on within 12 s", "stage 1 (rank 1: ", "in 1RECV2"]
    assert all(word in text for word in words for text in texts), texts
