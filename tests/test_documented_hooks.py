"""What the pages on the command line and on hooks show is done as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_hooks_are_as_the_page_has_them() -> None:
    found = blocks("hooks.md", "python")
    assert len(found) == 3
    for code in found:
        exec(compile(code, "hooks.md", "exec"), {"__name__": "page"})


@pytest.mark.alone
def test_the_command_lines_run(tmp_path: Path) -> None:
    """In one folder, one after the other, by a shell."""
    (tmp_path / "unlocked").write_text(f'#!/bin/sh\nexec {sys.executable} -m unlocked "$@"\n')
    (tmp_path / "unlocked").chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key != "UNLOCKED_SAVE_PATH"}
    environment = kept | {"PATH": f"{tmp_path}:{kept['PATH']}", "OMP_NUM_THREADS": "1"}
    lines = [line for block in blocks("command_line.md", "sh") for line in block.splitlines()]
    assert len(lines) == 4
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, (line, done.stderr)
    assert (tmp_path / "experiments" / "SmallConv-digits-LLS-Adam-2" / "model_final.pt").exists()
    assert "<svg" in (tmp_path / "runs.html").read_text()
