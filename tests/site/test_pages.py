"""What the pages for beginners say can be typed, typed: their Python, page by page, and their commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("start.md", "your_network.md", "hugging_face.md", "your_rule.md", "python.md", "tasks.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """All of a page's pieces in one process, as a reader would type them after each other."""
    code = "\n".join(["import torch; torch.set_num_threads(1)", *blocks(page, "python")])
    script = tmp_path / "page.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracies = [float(found) for found in re.findall(r"(\d+\.\d) %", done.stdout)]
    assert accuracies
    assert min(accuracies) > 80, done.stdout


@pytest.mark.alone
def test_the_commands_of_the_first_page_run(tmp_path: Path) -> None:
    lines = [line for block in blocks("start.md", "sh") for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["install", "train", "simulate"]
    for line in lines[1:]:
        command = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, (line, done.stderr)
        assert "test accuracy" in done.stdout or "Timeline" in done.stdout, (line, done.stdout)
