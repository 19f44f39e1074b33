"""Claims on cells and on the machine, between real processes."""

import errno
import fcntl
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from unlocked.comparison.cells import claimed, machine_held

SPAWN = multiprocessing.get_context("spawn")


def _claim(path: Path, pipe: Connection) -> None:
    with claimed(path) as mine:
        pipe.send(mine)
        pipe.recv()
    os._exit(0)


def _hold(folder: Path, alone: bool, pipe: Connection) -> None:
    pipe.send("asks")
    with machine_held(folder, alone=alone):
        pipe.send("holds")
        pipe.recv()


def _start(target: object, *arguments: object) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(*arguments, theirs))  # type: ignore[arg-type]
    process.start()
    return process, ours


@pytest.mark.parametrize("way", ["leaves", "is killed"])
def test_a_claim_ends_with_its_process(way: str, tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    process, pipe = _start(_claim, path)
    assert pipe.recv() is True
    with claimed(path) as mine:
        assert not mine
    if way == "leaves":
        pipe.send("go")
    else:
        process.kill()
    process.join()
    with claimed(path) as mine:
        assert mine


def test_measuring_has_the_machine_alone(tmp_path: Path) -> None:
    one, first = _start(_hold, tmp_path, False)
    two, second = _start(_hold, tmp_path, False)
    for pipe in (first, second):
        assert [pipe.recv(), pipe.recv()] == ["asks", "holds"]  # those that train share it
    three, third = _start(_hold, tmp_path, True)
    assert third.recv() == "asks"
    first.send("go")
    one.join()
    assert not third.poll(0.2)  # the second is still at work
    second.send("go")
    assert third.recv() == "holds"
    third.send("go")
    for process in (two, three):
        process.join()


def _count(path: Path, pipe: Connection) -> None:
    """Claims again and again; says how often, and whether somebody else held the same cell meanwhile."""
    inside, met = path.with_suffix(".inside"), False
    pipe.send("ready")
    pipe.recv()
    for _ in range(1000):
        with claimed(path) as mine:
            if mine:
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    inside.unlink()
                except OSError:
                    met = True
    pipe.send(met)


def test_no_two_have_one_claim(tmp_path: Path) -> None:
    """Nor where a lock is taken that its last owner has just removed."""
    started = [_start(_count, tmp_path / "cell.json") for _ in range(3)]
    for _, pipe in started:
        assert pipe.recv() == "ready"
    for _, pipe in started:
        pipe.send("go")
    met = [pipe.recv() for _, pipe in started]
    assert not any(met)
    for process, _ in started:
        process.join()


def test_the_machine_is_held_by_a_file_that_can_be_read(tmp_path: Path) -> None:
    """Over NFS a shared lock is a read lock, for which a file that is open for writing alone is no file."""
    with machine_held(tmp_path, alone=False):
        inode = (tmp_path / ".machine").stat().st_ino
        ours = [fd for fd in map(int, os.listdir("/dev/fd")) if _inode(fd) == inode]
        assert ours
        assert all(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR for fd in ours)


def _inode(fd: int) -> int | None:
    try:
        return os.fstat(fd).st_ino
    except OSError:  # the listing's own
        return None


def test_a_file_system_without_locks_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    for held in (claimed(tmp_path / "cell.json"), machine_held(tmp_path, alone=True)):
        with pytest.raises(OSError, match=r"(cell\.lock|\.machine) can't be locked \(No locks available\); give"):
            held.__enter__()
