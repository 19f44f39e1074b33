"""Containers have 64 MB of shared memory, or one each: `auto` trains all the same, `shared` says what is missing."""

import json
from pathlib import Path

import pytest
from ranks import PIPELINE, first_error, ranks
from small_disk import needs_mounts, on_small_disks

from unlocked.launch.pipeline import main

pytestmark = [pytest.mark.alone, needs_mounts]

FLAGS = ["--plain", "--max-steps", "12", "--no-eval", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plain loop's."""
    file = tmp_path_factory.mktemp("plain") / "summary.json"
    assert main([*FLAGS, "--engine", "sequential", "--summary", str(file)]) == 0
    return str(json.loads(file.read_text())["weights_sha256"])


@pytest.mark.parametrize(
    ("size", "words"),
    [("128k", ["bytes of shared memory are needed", "are free"]), ("64m", ["can't reach stage 1", "No such file"])],
    ids=["too small", "one each"],
)
def test_auto_trains_without_enough_shared_memory(size: str, words: list[str], digest: str, tmp_path: Path) -> None:
    """Every rank has a memory of its own here; in the first case none has room for a ring either."""
    file = tmp_path / "summary.json"
    prefix = on_small_disks({"/dev/shm": size})
    environment = {"TMPDIR": "/dev/shm"}
    with ranks(2, [str(PIPELINE), *FLAGS, "--summary", str(file)], prefix=prefix, environment=environment) as started:
        texts = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], texts
    assert all(word in texts[0] for word in ["through a process group", *words]), texts
    assert json.loads(file.read_text())["weights_sha256"] == digest


def test_shared_refuses_in_one_line_with_what_is_needed_and_free(tmp_path: Path) -> None:
    prefix = on_small_disks({"/dev/shm": "128k"})
    command = [str(PIPELINE), *FLAGS, "--transport", "shared"]
    with ranks(2, command, prefix=prefix, environment={"TMPDIR": "/dev/shm"}) as started:
        texts = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], texts
    for text in texts:
        assert "stage 1 (rank 1: " in first_error(text)
        assert "bytes of shared memory are needed: in /dev/shm " in first_error(text)
        assert "are free" in first_error(text)
        assert len(text.splitlines()) == 1
