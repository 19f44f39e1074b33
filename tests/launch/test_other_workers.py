"""A worker that does not belong to the others: of another release, or with other data. One line says so before step 0,
on every rank, with what each of the two has."""

import shutil
import subprocess
from pathlib import Path

import pytest
from dataset_files import write_mnist
from ranks import PIPELINE, ROOT, first_error, free_port, ranks

from unlocked import __version__
from unlocked.runtime.control.messages import PROTOCOL_VERSION

pytestmark = pytest.mark.alone


def refused(started: "list[subprocess.Popen[str]]") -> str:
    """The one line that all say."""
    texts = [one.communicate(timeout=240) for one in started]
    assert all(one.returncode not in (0, None) for one in started), texts
    lines = {first_error(text).partition(": ")[2] for _, text in texts}
    assert len(lines) == 1, texts
    assert not any("Traceback" in text or "epoch 1/" in out for out, text in texts), texts
    return lines.pop()


@pytest.mark.parametrize("differs", ["size", "digest"])
def test_other_data_is_refused_by_a_line_that_names_rank_and_what_differs(differs: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / "ours" / "MNIST" / "raw", sizes=(64, 32))
    write_mnist(tmp_path / "theirs" / "MNIST" / "raw", sizes=(66 if differs == "size" else 64, 32))
    if differs == "digest":
        (path,) = (tmp_path / "theirs").rglob("train-images-idx3-ubyte")
        content = bytearray(path.read_bytes())
        content[16] ^= 1  # the first pixel, behind the header
        path.write_bytes(content)
    command = [str(PIPELINE), "--plain", "--dataset", "MNIST", "--model", "MLP", "--batch-size", "16", "--dataset-dir"]
    extra = {0: [str(tmp_path / "ours")], 1: [str(tmp_path / "theirs")]}
    with ranks(2, command, extra=extra) as started:
        line = refused(started)
    assert f"data.{differs} is " in line
    assert " in rank 1 and " in line
    assert " in rank 0" in line
    assert "start all ranks with the same flags, data and release" in line
    assert ("data.size is 66 in rank 1 and 64 in rank 0" in line) is (differs == "size")


def test_another_release_is_refused_by_a_line_that_names_both(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in (
        ("runtime/control/messages.py", f"PROTOCOL_VERSION = {PROTOCOL_VERSION}", "PROTOCOL_VERSION = 99"),
        ("__init__.py", f'__version__ = "{__version__}"', '__version__ = "9.9.9"'),
    ):
        path = tmp_path / "src" / "unlocked" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    command, port = ["-m", "unlocked", "train", "--plain", "--dataset", "digits"], free_port()
    other = {"PYTHONPATH": str(tmp_path / "src")}
    with (
        ranks(2, command, port=port, only=[0]) as first,
        ranks(2, command, port=port, only=[1], environment=other) as second,
    ):
        line = refused([*first, *second])
    own = f"{__version__}, protocol {PROTOCOL_VERSION}"
    assert f"release is '9.9.9, protocol 99' in rank 1 and '{own}' in rank 0" in line
