"""`--summary`, `--trace` and chaos's `--report` take the place of a file of JSON, or of nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from unlocked.launch.pipeline import main
from unlocked.runtime import paths

KINDS = {
    "empty": (b"", True),
    "a summary": (b'{"engine": "sequential"}\n', True),
    "a list": (b" [1, 2]\n", True),
    "a program": (b"import os\n", False),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0", False),
    "half of one": (b'{"engine": "sequen', False),
    "a number": (b"3\n", False),
    "C": (b"{ int x; }", False),
    "many brackets": (b"[" * 100_000, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_json_is_replaced(kind: str, tmp_path: Path) -> None:
    content, is_ours = KINDS[kind]
    path = tmp_path / "there"
    path.write_bytes(content)
    assert taken(path) is is_ours


@pytest.mark.parametrize(("ends", "is_ours"), [("{}", True), (("\n[", "]\n"), True), ("x}", False), ("{x", False)])
def test_a_large_file_is_known_by_its_ends(
    ends: Sequence[str], is_ours: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paths, "_PARSED_BYTES", 10)
    path = tmp_path / "there"
    path.write_text(ends[0] + " " * 100 + ends[1])
    assert taken(path) is is_ours


def taken(path: Path) -> bool:
    try:
        return paths.checked_path("summary", path, "JSON file") == path
    except ValueError as error:
        return "has something else than JSON, and would be lost; give a file in a folder of yours" not in str(error)


@pytest.mark.parametrize("flag", ["--summary", "--trace"])
def test_a_file_of_the_users_is_left_alone(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.py"
    path.write_text("precious = 1\n")
    assert main(["--plain", "--engine", "sequential", "--max-steps", "1", flag, str(path)]) == 2
    assert f"error: {flag.strip('-')} {path} is there" in capsys.readouterr().err
    assert path.read_text() == "precious = 1\n"
