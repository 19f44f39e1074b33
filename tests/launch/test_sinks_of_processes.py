"""A sink of a run over processes hears how the run ends, also when another process ends it, and is closed once."""

import re
from pathlib import Path

import pytest
from ranks import ranks

WORKER = str(Path(__file__).with_name("sink_worker.py"))


@pytest.mark.parametrize(
    ("what", "victim", "story"),
    [
        ("ends", 0, "finish"),
        ("fails", 1, r"failure stage 1 \(rank 1: .*the rule broke"),
        ("dies", 1, r"failure .*stage 1 \(rank 1: "),
    ],
)
def test_the_sink_hears_the_end(what: str, victim: int, story: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    with ranks(2, [WORKER, str(file), what, str(victim)]) as started:
        errors = [process.communicate(timeout=120)[1] for process in started]
    assert (started[0].returncode == 0) == (what == "ends"), errors
    heard = file.read_text()
    assert re.fullmatch(f"start\n{story}.*\nclose\n", heard), (heard, errors)
