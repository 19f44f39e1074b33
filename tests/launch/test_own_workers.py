"""`unlocked train --stages N`: the command starts the processes itself, and takes them along when it ends."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlocked.launch import own_workers

pytestmark = pytest.mark.alone


def start(*flags: str, folder: Path) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unlocked", "train", "--dataset", "digits", "--plain", *flags]
    return subprocess.Popen(command, cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupt_ends_in_order_and_without_a_traceback(tmp_path: Path) -> None:
    running = start("--stages", "2", "--num-epochs", "100000", "--summary", "summary.json", folder=tmp_path)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("epoch 2/"):
            break
    running.send_signal(signal.SIGINT)
    told, complaints = running.communicate(timeout=60)
    assert running.returncode == 130
    assert re.search(r"^stopped by signal 2 after \d+ training micro-batches$", told, re.MULTILINE), told
    assert not complaints, complaints
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--engine", "processes"), r"error: .* give --stages N or --stages auto, "),
        (("--stages", "6"), r"error.*: 6 processes for the 5 layers of the network; .* at most 5"),
        (("--stages", "2", "--model", "VGG9"), r"error.*: .*VGG9"),
    ],
)
def test_a_mistake_is_told_in_lines_of_ours(flags: tuple[str, ...], told: str, tmp_path: Path) -> None:
    running = start(*flags, folder=tmp_path)
    output, complaints = running.communicate(timeout=60)
    assert running.returncode == 2, complaints
    assert not output
    lines = complaints.splitlines()
    assert lines
    assert all(re.match(told, line) for line in lines), complaints


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_process_that_is_killed_amid_its_imports_is_named_and_takes_the_others_along(tmp_path: Path) -> None:
    """Nobody but the launcher can know of it: the others wait for it to come."""
    running = start("--stages", "2", "--num-epochs", "100000", folder=tmp_path)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    victim = None
    while victim is None:
        assert running.poll() is None
        time.sleep(0.001)
        for pid in children.read_text().split():
            with contextlib.suppress(OSError):  # a helper of the launcher's, which has ended
                if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    victim = int(pid)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    complaints = running.communicate(timeout=60)[1]
    assert time.monotonic() - began < 15
    assert running.returncode == 128 + signal.SIGKILL
    assert "stage 1 (rank 1: layers unknown) was ended by SIGKILL" in complaints


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("sys.exit(1)", 1, "stage 1 (rank 1: layers unknown) left with exit code 1, and the others did not end"),
        ("os.kill(os.getpid(), 11)", 139, "stage 1 (rank 1: layers unknown) was ended by SIGSEGV"),
    ],
)
def test_who_left_is_named_where_the_others_stand_still(
    end: str, code: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = f"import os, sys, time\nif os.environ['RANK'] == '1':\n    {end}\ntime.sleep(60)\n"
    (tmp_path / "still_worker.py").write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("_SHORT_PATIENCE", "_HASTE"):
        monkeypatch.setattr(own_workers, name, 0.1)
    assert own_workers.start_workers(2, "still_worker", [], threads=1) == code
    assert capsys.readouterr().err.startswith(f"error: {told}")
