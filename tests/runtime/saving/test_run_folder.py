"""A run's folder: the processes of one run agree on it, and runs that begin at the same moment don't share one."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from unlocked.runtime.saving import run_folder
from unlocked.runtime.saving.run_folder import claim_folder, find_run, give_up_claim, numbers_of, run_folder_of

CLAIM = """
import sys, pathlib
from unlocked.runtime.saving.run_folder import claim_folder
print(claim_folder(pathlib.Path(sys.argv[1]), "run"), flush=True)
sys.stdin.read()
"""


def start(root: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLAIM, str(root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | dict(environment), **pipes)  # type: ignore[call-overload, no-any-return]


def launched(port: int, rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def numbers(started: list[subprocess.Popen[str]]) -> list[int]:
    told = [int(process.stdout.readline()) for process in started if process.stdout]
    for process in started:
        process.communicate(timeout=60)
    return told


def finish(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.log").write_text("a run\n")


def test_runs_that_begin_together_get_folders_of_their_own(tmp_path: Path) -> None:
    """Six of them, two of which have three processes each."""
    lone: list[Mapping[str, str]] = [{}, {}, {}, {}]
    ranks = [launched(port, rank) for rank in range(3) for port in (1, 2)]
    found = numbers([start(tmp_path, environment) for environment in (*ranks, *lone)])
    assert Counter(Counter(found).values()) == {1: 4, 3: 2}
    assert sorted(set(found)) == [1, 2, 3, 4, 5, 6]
    assert found[0] == found[2] == found[4]
    assert found[1] == found[3] == found[5]


def test_a_folder_that_holds_a_run_is_passed_over(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    finish(tmp_path / "run-2")
    (tmp_path / "run-3").mkdir()  # of nobody
    finish(tmp_path / "run-12x")
    finish(tmp_path / "running")
    assert numbers_of(tmp_path, "run") == [1, 2]
    assert claim_folder(tmp_path, "run") == 3
    give_up_claim(tmp_path / "run-3", failed=False)
    assert not (tmp_path / "run-3").exists()
    assert claim_folder(tmp_path, "run", 2) == 2
    give_up_claim(tmp_path / "run-2", failed=False)
    assert [path.name for path in (tmp_path / "run-2").iterdir()] == ["train.log"]


def test_a_dead_process_has_no_claim(tmp_path: Path) -> None:
    """It came to nothing, so its number is free."""
    assert numbers([start(tmp_path, {})]) == [1]
    assert (tmp_path / "run" / ".run.claim").exists()
    assert claim_folder(tmp_path, "run") == 1


def test_a_process_that_is_started_again_keeps_its_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the run, whose files are there; the next run by the same launcher's address has another one."""
    for name, value in launched(3, 0).items():
        monkeypatch.setenv(name, value)
    assert numbers([start(tmp_path, launched(3, 1))]) == [1]
    finish(tmp_path / "run")
    assert claim_folder(tmp_path, "run") == 1
    give_up_claim(tmp_path / "run", failed=True)
    assert claim_folder(tmp_path, "run") == 1
    give_up_claim(tmp_path / "run", failed=False)
    assert claim_folder(tmp_path, "run") == 2


def test_the_run_that_goes_on_is_found(tmp_path: Path) -> None:
    for number, rule in ((1, "LLS"), (2, "LLS_M"), (3, "LLS")):
        folder = tmp_path / ("run" if number == 1 else f"run-{number}")
        finish(folder)
        (folder / "config.json").write_text(f'{{"settings": {{"rule": "{rule}"}}}}')
    (tmp_path / "run-3" / "config.json").write_text("{damaged")
    assert find_run(tmp_path, "run", settings={"rule": "LLS", "new": 1}, resume=None) == 1
    assert find_run(tmp_path, "run", settings={"rule": "LLS_M"}, resume=None) == 2
    assert find_run(tmp_path, "run", settings={"rule": "BP"}, resume=None) is None
    inside = tmp_path / "run-2" / "snapshots" / "step-00000042"
    for path in (inside, inside.parent, inside.parent.parent):
        assert run_folder_of(path) == tmp_path / "run-2"
        assert find_run(tmp_path, "run", settings=None, resume=path) == 2
        assert find_run(tmp_path / "other", "run", settings=None, resume=path) is None
    for path in (inside.parent / "set-aside-1", inside.parent / "set-aside-1" / inside.name):
        assert find_run(tmp_path, "run", settings=None, resume=path) is None, "it would put the run's own aside"


def test_a_closed_save_path_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"can't write to the save path .*file"):
        claim_folder(tmp_path / "file", "run")


def test_a_claim_that_nobody_can_read_is_void(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_folder._CLAIM).write_text("[1")
    assert claim_folder(tmp_path, "run") == 1
