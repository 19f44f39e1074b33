"""A stop right behind a mark leaves the mark's snapshot as it is: complete, and the newest."""

from pathlib import Path

import pytest
from ranks import ranks

from unlocked.runtime.saving.snapshots import newest_whole

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("stop_worker.py"))


@pytest.mark.parametrize(("what", "recoveries"), [("again", 0), ("dies", 1)])
def test_the_snapshot_of_a_stop_behind_a_mark_is_complete(what: str, recoveries: int, tmp_path: Path) -> None:
    """One is kept, so nothing else is there to go on from. A worker may die between its part and its end."""
    with ranks(2, [WORKER, str(tmp_path), what]) as started:
        texts = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    snapshot, problems = newest_whole(tmp_path)
    assert snapshot is not None, "the stop has un-completed it"
    assert problems == []
    assert texts[0][0].splitlines()[-1] == f"stopped after {snapshot.steps}, {recoveries} recoveries"
