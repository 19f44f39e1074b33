"""Claims on cells and on the machine, between real processes."""

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
