"""The description of a machine: what is in it, and that it is plain data with one line for a terminal."""

import json
import os

import pytest
import torch

from unlocked.comparison import environment as module
from unlocked.comparison.environment import environment
from unlocked.comparison.results import Environment
from unlocked.data.cores import usable_cores
from unlocked.runtime.typed import from_plain, to_plain


def test_it_is_plain_data_and_comes_back() -> None:
    found = environment()
    assert from_plain(Environment, json.loads(json.dumps(to_plain(found))), "environment") == found
    assert found.cores == usable_cores() >= 1
    assert found.versions["torch"] == torch.__version__
    assert f"{found.cores} cores" in found.line
    assert f"torch {torch.__version__}" in found.line


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not let a process choose")
def test_only_the_cores_that_the_process_may_use_count() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_variable_names_the_commit_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_commit", lambda: None)
    monkeypatch.setenv("COMMIT", "abc1234")
    assert environment().commit == "abc1234"
    monkeypatch.delenv("COMMIT")
    assert environment().commit is None
