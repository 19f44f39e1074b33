"""What workers print reaches the caller as they wrote it, save the word with which one ends, which is raised there."""

import os
import subprocess
import sys
from multiprocessing.connection import Pipe

import pytest

from unlocked.runtime.engines.processes.local_launch import Started
from unlocked.runtime.engines.processes.reports import first_cause
from unlocked.runtime.engines.processes.spawn import _Run


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"error [rank 1]: all is lost", b"\n"), ""),
        ((b"err", b"or: all", b" is lost\n"), ""),
        ((b"a line\nerror: lost\nand ", b"a half"), "a line\nand a half"),
        ((b"errors happen", b"\n"), "errors happen\n"),
        ((b"erratum",), "erratum"),
        ((b"err",), "err"),
        ((b"\n", b"error", b" bars\n"), "\nerror bars\n"),
    ],
)
def test_a_line_in_pieces_is_judged_whole(
    pieces: tuple[bytes, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    ours, theirs = Pipe()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    one = Started(1, process, ours)
    with theirs, ours, os.fdopen(read, "rb") as stream:
        run = _Run([one], list)
        for piece in pieces:
            os.write(write, piece)
            assert run._relay(one, stream, "stderr")
        os.close(write)
        assert not run._relay(one, stream, "stderr")
    assert capsys.readouterr().err == expected


def test_the_end_of_a_process_that_said_nothing_is_told() -> None:
    ours, theirs = Pipe()
    process = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    process.wait()
    with theirs, ours:
        assert _Run([Started(2, process, ours)], list).ends() == [
            "the process of stage 2 (rank 2) was ended by SIGSEGV"
        ]


def test_who_is_merely_missed_is_told_with_all_that_is_known() -> None:
    reports = [
        ("failed", "echo", "stage 1 is lost", None),
        ("failed", "echo", "stage 1 is lost: its worker left", None),
        ("failed", "echo", "stage 1 is lost", None),
    ]
    error = first_cause(reports, "", ["stage 2 was ended by SIGSEGV"])
    assert str(error) == "stage 1 is lost"
    assert error.__notes__ == ["stage 2 was ended by SIGSEGV", "stage 1 is lost: its worker left"]
    error = first_cause([*reports, ("failed", "failure", "own", "trace")], "", ["more"])
    assert (str(error), len(error.__notes__)) == ("own", 1)
