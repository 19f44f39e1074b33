"""The rooms and their arrows (launch -> runtime -> workers -> rules -> kernels), and what every file has to keep."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "models", "data", "rules", "workers", "runtime", "launch")
GROUND = {"models", "data", "kernels"}
MAY_IMPORT = {
    "kernels": set(),
    "models": {"kernels"},
    "data": {"kernels"},
    "rules": GROUND,
    "workers": {"rules", *GROUND},
    "runtime": {"workers", "rules", *GROUND},
    "launch": {"runtime", "workers", "rules", *GROUND},
}
MAX_LINES = 450
# Folders of one machine, as an absolute path's first part. Put together here, so that this file doesn't hold one.
MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(?:" + "|".join(["work", "tmp", "home", "root", "Users"]) + r")/\w")


def _imports(path: Path) -> set[str]:
    """All modules of this project that a file names: in imports anywhere, and in strings such as import_module's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.add(node.value)
    return {name for name in found if name.split(".")[0] == "unlocked"}


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_run_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    allowed = {room, *MAY_IMPORT[room]}
    for path in files:
        for name in _imports(path):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else ""
            assert target in allowed, f"{path.relative_to(ROOT)} names {name}, but {room} may use {sorted(allowed)}"


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_a_top_level_module(room: str) -> None:
    """`import data` from a room's file would take whatever lies on the path under that name."""
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & set(ROOMS), path


@pytest.mark.parametrize(
    "modules", ["unlocked", "unlocked.runtime.schedule, unlocked.runtime.simulate, unlocked.runtime.partition"]
)
def test_planning_needs_no_torch(modules: str) -> None:
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_are_there() -> None:
    import unlocked

    for name in unlocked.__all__:
        assert getattr(unlocked, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Coach'"):
        _ = unlocked.Coach


def test_files_are_short() -> None:
    code = {".py", ".cu", ".cuh", ".cpp", ".h", ".sh"}
    lengths = {path: len(path.read_text().splitlines()) for path in _tracked() if path.suffix in code}
    assert lengths
    # A test file lists cases, one after the other; what is read as a whole is the library.
    long = {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > MAX_LINES and "tests" not in p.parts}
    assert not long


def test_no_file_names_a_machine() -> None:
    assert MACHINE_PATH.search("see " + "/work" + "/main")
    assert not MACHINE_PATH.search("runs/tmp/x and $HOME/work/x")
    for path in _tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = MACHINE_PATH.search(text)
        assert found is None, f"{path.relative_to(ROOT)}: {text[found.start() : found.end() + 30]!r}" if found else ""
