"""A value that is not a number comes into a run of real processes: all end, and say where it came in."""

import re
from pathlib import Path

import pytest
from nan_worker import WAYS, check_what_is_left
from ranks import ranks

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("nan_worker.py"))


@pytest.mark.parametrize("way", ["a later layer in mid-epoch", "the evaluation alone", "the last update"])
def test_it_ends_all_ranks_with_epoch_and_cause(way: str, tmp_path: Path) -> None:
    with ranks(2, [WORKER, "processes", way, "nan", str(tmp_path)]) as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode not in (0, None) for process in started), texts
    pattern = WAYS[way][1].replace("E ", "epoch ")
    assert any(re.search(pattern, text) for text in texts), texts
    check_what_is_left(tmp_path)
