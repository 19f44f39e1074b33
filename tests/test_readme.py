"""What the README says can be done, done."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_example_runs() -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 90


@pytest.mark.alone
def test_the_commands_run() -> None:
    """`make` is continuous integration's business, the installation `tests/launch/test_installed.py`'s."""
    others = ("make ", "pip ")
    lines = [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(others)]
    assert len(lines) == 5
    launchers = {"torchrun": ["-m", "torch.distributed.run"], "unlocked": ["-m", "unlocked"], "python": []}
    for line in lines:
        program, *words = shlex.split(line)
        command = [sys.executable, *launchers[program], *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, (line, done.stderr)
        assert "test accuracy" in done.stdout or "images/s" in done.stdout, line


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in t]
    assert len(targets) > 5
    for target in targets:
        assert (ROOT / target).exists(), target
