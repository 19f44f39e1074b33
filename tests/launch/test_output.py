"""Nobody listens: standard output that is closed, or whose reader leaves, costs a run nothing."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, PIPELINE

from unlocked.launch.output import lasting_output

EVALUATE = PIPELINE.with_name("evaluate.py")


def shell(command: Sequence[object], redirections: str) -> "subprocess.CompletedProcess[str]":
    """Runs in bash; what is not redirected is returned."""
    words = " ".join(f"'{word}'" for word in (sys.executable, *command))
    script = f"{words} {redirections}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.alone
def test_a_run_without_a_reader_trains_and_saves(tmp_path: Path) -> None:
    """Whatever is closed before, or in the middle: the same files, the same code, and not a word on standard error."""
    flags = ["--plain", "--max-steps", "2", "--print-freq", "1", "--save-path", tmp_path, "--experiment-name"]
    digests = set()
    for name, redirections in {"closed": ">&-", "all-closed": "<&- >&- 2>&-", "left": "| head -1"}.items():
        done = shell([PIPELINE, *flags, name], redirections)
        assert (done.returncode, done.stderr) == (0, ""), (name, done)
        assert len(done.stdout.splitlines()) == (1 if name == "left" else 0)
        log = (tmp_path / name / "train.log").read_text()
        digests.add(json.loads(log.splitlines()[-1].removeprefix("Finished: "))["weights_sha256"])
        assert (tmp_path / name / "model_final.pt").is_file()
        assert "epoch 1/10" not in log, "what is printed has found its way into a file"
    assert len(digests) == 1
    done = shell([EVALUATE, tmp_path / "closed" / "model_final.pt"], "| true")
    assert (done.returncode, done.stderr) == (0, ""), done
    done = shell([PIPELINE, "--batch-size", "0"], ">&-")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_a_pipe_that_breaks_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output():
            print("heard", flush=True)
            assert os.read(reading, 100) == b"heard\n"
            os.close(reading)
            for _ in range(3):
                print("not heard", flush=True)
            print("left in the buffer")
            assert sys.stdout.fileno() == writing
        assert sys.stdout is stream


def test_a_warning_is_one_line() -> None:
    before = warnings.formatwarning
    with lasting_output():
        assert warnings.formatwarning("two\nlines", UserWarning, "file.py", 7) == "warning: two lines\n"
    assert warnings.formatwarning is before
