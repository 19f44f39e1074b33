"""A zygote's workers come one after the other, say what they have to say, and end with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlocked.runtime.control.zygote import CAN_FORK, Ended, Told, WorkerLine, Zygote, how_it_ended

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="workers are tied to their parents by what only Linux has")
SECONDS = 20.0


def events(zygote: Zygote, count: int) -> list[Ended | Told]:
    found: list[Ended | Told] = []
    deadline = time.monotonic() + SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline
        found += zygote.events(1.0)
    return found


def work(line: WorkerLine) -> None:
    line.tell("here", pid=os.getpid())
    line.await_go()
    if line.incarnation == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    line.tell("done")


def test_workers_come_one_after_the_other() -> None:
    zygote = Zygote(work)
    try:
        zygote.start(0)
        [first] = events(zygote, 1)
        assert isinstance(first, Told)
        assert (first.incarnation, first.what) == (0, "here")
        zygote.start(1)  # in the place of the first
        found = events(zygote, 2)  # of two workers: what one has said comes before any end
        (second,) = [event for event in found if isinstance(event, Told)]
        assert [event for event in found if event is not second] == [Ended(0, -signal.SIGKILL)]
        assert second.content["pid"] != first.content["pid"]
        zygote.say_go()
        assert events(zygote, 1) == [Ended(1, -signal.SIGSEGV)]
        zygote.start(2)
        third, done, last = events(zygote, 3)
        assert isinstance(third, Told)
        assert (done, last) == (Told(2, "done", {}), Ended(2, 0))
    finally:
        zygote.close()


def test_a_worker_that_stands_still_can_be_ended() -> None:
    def stand(line: WorkerLine) -> None:
        line.tell("here")
        os.kill(os.getpid(), signal.SIGSTOP)

    zygote = Zygote(stand)
    zygote.start(0)
    events(zygote, 1)
    zygote.end_worker()
    assert events(zygote, 1) == [Ended(0, -signal.SIGKILL)]
    zygote.close()
    zygote.close()


def test_a_zygote_that_stands_still_is_noticed_and_can_be_ended() -> None:
    zygote = Zygote(lambda line: line.tell("here", pid=os.getpid(), zygote=os.getppid()))
    zygote.start(0)
    here, ended = events(zygote, 2)
    assert isinstance(here, Told)
    assert ended == Ended(0, 0)
    assert not zygote.stands_still(0.0)
    os.kill(here.content["zygote"], signal.SIGSTOP)
    zygote.start(1)
    assert zygote.events(0.1) == []
    zygote.start(2)
    assert zygote.stands_still(0.1), "a further order is no sign of life"
    assert zygote.stands_still(0.05)
    zygote.give_up()
    assert not zygote.stands_still(0.05)
    zygote.close()
    assert not lives(here.content["zygote"])


SUPERVISE = """
import os, sys, time
from unlocked.runtime.control.zygote import Zygote
zygote = Zygote(lambda line: (line.tell("here", pid=os.getpid(), zygote=os.getppid()), time.sleep(3600)))
zygote.start(0)
while not (found := zygote.events(1.0)):
    pass
print(found[0].content["pid"], found[0].content["zygote"], flush=True)
time.sleep(3600)
"""


@pytest.mark.alone
@pytest.mark.parametrize("victim", ["supervisor", "zygote"])
def test_nobody_outlives_the_one_that_started_it(victim: str) -> None:
    command = [sys.executable, "-c", SUPERVISE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        worker, zygote = map(int, supervisor.stdout.readline().split())
        os.kill(supervisor.pid if victim == "supervisor" else zygote, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while any(map(lives, [worker, zygote])):
            assert time.monotonic() < deadline, "a process outlives the one that started it"
        supervisor.kill()


UNTIED = """
import ctypes, os, signal
from unlocked.runtime.control.ending import Verdict, end_process, last_act
from unlocked.runtime.control.zygote import Zygote
def stand(line):
    ctypes.CDLL(None).prctl(1, 0)  # as one that is stopped before its first line
    line.tell("here", pid=os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
zygote = Zygote(stand)
with last_act(lambda _: zygote.let_go()):
    zygote.start(0)
    while not (found := [one for one in zygote.events(1.0) if getattr(one, "what", "") == "here"]):
        pass
    print(found[0].content["pid"], flush=True)
    end_process(Verdict("over"), None)
"""


def test_an_end_in_order_takes_along_a_worker_that_was_stopped_as_it_began() -> None:
    # A session of its own: the kernel wakes and ends those that stand still in a group that loses its last parent.
    command = [sys.executable, "-c", UNTIED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as supervisor:
        assert supervisor.stdout is not None
        worker = int(supervisor.stdout.readline())
        assert supervisor.wait(SECONDS) == 1
        is_left = lives(worker)
        if is_left:
            os.kill(worker, signal.SIGKILL)
    assert not is_left


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_end_is_told_in_words() -> None:
    assert how_it_ended(-signal.SIGKILL) == "was ended by SIGKILL"
    assert how_it_ended(3) == "left with exit code 3 and without a word"
    assert how_it_ended(-64 - 1) == "was ended by signal 65"
