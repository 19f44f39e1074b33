"""A run's processes are found by their mark, whoever started them, and can be hit."""

import os
import random
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from unlocked.comparison.chaos.kinds import KINDS
from unlocked.comparison.chaos.tree import MARK, Process, Tree, cut_connection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

# A launcher with two ranks; the first one has a child that works for it.
LAUNCHER = """
import os, subprocess, sys
child = [sys.executable, "-c", "print('up', flush=True); input()"]
parent = [sys.executable, "-c", f"import subprocess; subprocess.run({child!r})"]
ranks = [subprocess.Popen(c, env=os.environ | {"RANK": str(r)}) for r, c in enumerate((parent, child))]
for one in ranks:
    one.wait()
"""


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def launcher(mark: str) -> Iterator["subprocess.Popen[str]"]:
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {MARK: mark}
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        yield process
        Tree(mark).end()


def test_workers_are_told_from_what_starts_them(launcher: "subprocess.Popen[str]", mark: str) -> None:
    tree = Tree(mark)
    heads, workers = tree.heads(), tree.workers()
    assert sorted(heads) == sorted(workers) == [0, 1]
    assert workers[0].parent == heads[0].pid
    assert workers[1] == heads[1]
    assert {one.parent for one in heads.values()} == {launcher.pid}
    assert [one.pid for one in tree.processes() if one.rank is None] == [launcher.pid]
    assert len(tree.processes()) == 4
    assert Tree("another").processes() == []


def test_a_fault_hits_one_of_them(launcher: "subprocess.Popen[str]", mark: str, tmp_path: object) -> None:
    tree = Tree(mark)
    before = tree.workers()
    blow = KINDS["stop"].strike(tree, None, random.Random(0))  # type: ignore[arg-type]
    assert blow is not None
    assert blow.rank is not None
    hit = before[blow.rank]
    assert blow.pids == (hit.pid,)
    hit.send(signal.SIGCONT)
    assert KINDS["launcher"].strike(tree, None, random.Random(0)) is not None  # type: ignore[arg-type]
    launcher.wait(10)
    assert launcher.returncode == -signal.SIGKILL
    assert tree.end() >= 2
    assert tree.is_gone(10)
    assert KINDS["kill"].strike(tree, None, random.Random(0)) is None  # type: ignore[arg-type]


def test_a_connection_is_cut_from_outside() -> None:
    code = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(s.recv(9))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", code, str(server.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            connection, _ = server.accept()
            with connection:
                try:
                    assert cut_connection(Process(child.pid, os.getpid(), None), random.Random(0))
                except OSError as error:
                    child.kill()
                    pytest.skip(f"this system does not let it: {error}")
                assert connection.recv(1) == b""
            assert child.stdout is not None
            assert child.stdout.read() == "b''\n"
