"""A folder has one run at a time, which is named to all others."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from unlocked.runtime.saving.folder_lock import hold_folder

HOLD = """
import sys
from pathlib import Path
from unlocked.runtime.saving.folder_lock import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("here", flush=True)
    input()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


def test_a_second_run_hears_who_has_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        with pytest.raises(ValueError, match="in use by another run") as caught, hold_folder(tmp_path / "run"):
            pass
        assert f"process {first.pid} on {socket.gethostname()}, started 2" in str(caught.value)
        first.kill()
        first.wait()
    with hold_folder(tmp_path / "run"):  # the kernel has given it back
        assert str(os.getpid()) in (tmp_path / "run" / ".run.lock").read_text()


def test_a_second_run_of_the_same_process_does_too(tmp_path: Path) -> None:
    mine = pytest.raises(ValueError, match=rf"this process \({os.getpid()}\)")
    with hold_folder(tmp_path), mine, hold_folder(tmp_path / "x" / ".."):
        pass
    with hold_folder(tmp_path):
        pass


def test_a_forked_child_does_not_keep_it(tmp_path: Path) -> None:
    read, write = os.pipe()
    with hold_folder(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has closed its end
            os._exit(0)
    with hold_folder(tmp_path):
        pass
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)


def test_a_run_that_came_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with hold_folder(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't write to the save path"), hold_folder(tmp_path / "file" / "run"):
        pass
