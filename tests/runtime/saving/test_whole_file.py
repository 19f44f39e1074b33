"""Files are written whole: whatever happens in the middle, a reader finds the old file or the new one."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlocked.runtime.saving.whole_file import json_text, whole_file, write_json, write_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from unlocked.runtime.saving.whole_file import whole_file
with whole_file(Path(sys.argv[1])) as temporary:
    with temporary.open("w") as file:
        file.write("half of the new te")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("the old text")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "the old text"


@pytest.mark.parametrize("old", [None, "the old text"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_middle_leaves_nothing_new(old: str | None, error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    before = sorted(tmp_path.iterdir())

    def write() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half of")
            assert not path.exists() if old is None else path.read_text() == old
            raise error

    with pytest.raises(error):
        write()
    assert sorted(tmp_path.iterdir()) == before
    assert old is None or path.read_text() == old


def test_the_new_file_takes_the_old_ones_place_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("the old text")
    with path.open() as reader:
        write_whole(path, "the new text\r\nä\n")
        assert reader.read() == "the old text", "who has begun to read the old one reads it to its end"
    assert path.read_bytes() == "the new text\r\nä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 255, "я" * 120 + ".json", "語" * 85], ids=["one byte", "two bytes", "three"])
def test_every_name_that_the_file_system_takes_can_be_written(name: str, tmp_path: Path) -> None:
    """Its limit counts bytes: 255 of them."""
    (tmp_path / name).write_text("the old text")
    write_whole(tmp_path / name, "the new text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "the new text")]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_mode_is_the_umasks(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "target.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    link.symlink_to(target)
    for text in ("one", "two"):
        write_whole(link, text)
        assert link.is_symlink()
        assert target.read_text() == text


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    heard: list[str] = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "text")
    reader.join(10)
    assert heard == ["text"]
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file.txt", "text")


def test_long_names_have_room(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250)
    write_whole(path, "text")
    assert path.read_text() == "text"


_NUMBERS = st.floats() | st.integers() | st.booleans() | st.none() | st.text(max_size=3)
_CONTENT = st.recursive(
    _NUMBERS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4)
)


@given(_CONTENT)
def test_json_is_json_whatever_the_numbers(content: Any) -> None:
    """The truth: a reader that knows no NaN and no infinity finds each of them null, and everything else as it was."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    def expect(value: Any) -> Any:
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            return None
        if isinstance(value, dict):
            return {name: expect(item) for name, item in value.items()}
        return [expect(item) for item in value] if isinstance(value, list) else value

    assert json.loads(json_text(content), parse_constant=refuse) == expect(content)


def test_a_json_file_ends_in_a_line(tmp_path: Path) -> None:
    write_json(
        tmp_path / "a.json", {"loss": float("nan"), "where": tmp_path, "rows": (1.5, float("-inf"))}, default=str
    )
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text) == {"loss": None, "where": str(tmp_path), "rows": [1.5, None]}
