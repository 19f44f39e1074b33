"""The arrows between the rooms run one way only, and what must not need torch does not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each room and the rooms it may import.
ALLOWED = {
    "kernels": set(),
    "models": {"kernels"},
    "data": {"kernels"},
    "rules": {"kernels"},
    "workers": {"rules", "kernels", "models", "data"},
    "runtime": {"workers", "rules", "kernels", "models", "data"},
    "comparison": {"runtime", "workers", "rules", "kernels", "models", "data"},
    "launch": {"comparison", "runtime", "workers", "rules", "kernels", "models", "data"},
}


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports, inside functions as well."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "unlocked"]
    return {name.split(".")[1] for name in names if name.startswith("unlocked.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_arrows_run_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        foreign = imported_rooms(path) - ALLOWED[room] - {room}
        assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}; {room} may import {ALLOWED[room]}"


def test_a_forbidden_arrow_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from unlocked.runtime import Trainer\n    import unlocked.launch.pipeline\n")
    assert imported_rooms(path) == {"runtime", "launch"}


def test_files_are_short() -> None:
    sources = [p for room in ALLOWED for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".cu", ".cpp", ".cuh")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_the_schedule_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import unlocked, unlocked.runtime\n"
        "from unlocked.runtime.schedules import schedule, simulate, partition, stream\n"
        "from unlocked.runtime.control import coordinator\n"
        "from unlocked.runtime.metrics import dashboard, run_log\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_namespace_is_links_to_the_rooms() -> None:
    package = ROOT / "src" / "unlocked"
    for room in ALLOWED:
        assert (package / room).is_symlink()
        assert (package / room).resolve() == ROOT / room
