"""A run of real processes whose every port is spoken to by strangers: the bits are those of the plain loop, and memory
is bounded. And on one machine a run has no port beyond the loopback address."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, PIPELINE, free_port, ranks
from strangers import KINDS, Strangers

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

MESSAGES = int(os.environ.get("UNLOCKED_STRANGERS", "2000"))  # 20000 for the long check
FLAGS = ["--dataset", "digits", "--max-steps", "20", "--no-eval", "--threads", "1", "--plain"]
LONG = ["--dataset", "digits", "--num-epochs", "30", "--threads", "1", "--plain"]
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}  # as proc(5) writes 127.0.0.1 and ::1


def memory(pid: int) -> int:
    """Bytes that a process has in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every listening socket of these processes."""
    found = set()
    for pid in pids:
        try:
            inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
            tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        except OSError:  # it has ended meanwhile
            continue
        for line in "".join(table.partition("\n")[2] for table in tables).splitlines():
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:  # the state is LISTEN
                address, _, port = words[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):  # it ends meanwhile
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, children.read_text().split())
    return found


def digest(path: Path) -> str:
    return str(json.loads(path.read_text())["weights_sha256"])


def digest_of(flags: list[str], folder: Path) -> str:
    """The plain loop's."""
    out = folder / "sequential.json"
    command = [sys.executable, str(PIPELINE), "--engine", "sequential", *flags, "--summary", str(out)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return digest(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return digest_of(FLAGS, tmp_path_factory.mktemp("sequential"))


def test_strangers_on_every_port_change_no_bit_and_take_no_memory(expected: str, tmp_path: Path) -> None:
    chance = random.Random(17)
    out, coordinator, store = tmp_path / "summary.json", free_port(), free_port()
    command = [str(PIPELINE), *FLAGS, "--summary", str(out), "--coordinator-port", str(coordinator)]
    with ranks(2, command, port=store, only=[0]) as first:
        deadline = time.monotonic() + 120
        while len(open_ports := listening([first[0].pid])) < 3:  # the store, the roll call, the coordinator
            assert time.monotonic() < deadline
            assert first[0].poll() is None
        assert {address for address, _ in open_ports} == {"0100007F"}
        (roll_call,) = {port for _, port in open_ports} - {coordinator, store}
        before = memory(first[0].pid)
        strangers = Strangers("127.0.0.1", coordinator, chance, replay=chance.randbytes(1000))
        elsewhere = [Strangers("127.0.0.1", port, chance) for port in (store, roll_call)]
        for number in range(MESSAGES):
            strangers.speak(KINDS[number % len(KINDS)])
            if number % 10 == 0:
                for others in elsewhere:
                    others.speak(chance.choice(["raw", "half-open"]))
        grown = memory(first[0].pid) - before
        crowd = []  # is still there when the second rank comes
        for _ in range(50):
            crowd.append(socket.create_connection(("127.0.0.1", coordinator), timeout=5))
        with ranks(2, command, port=store, only=[1]) as second:
            texts = [one.communicate(timeout=120) for one in (*first, *second)]
        for one in crowd:
            one.close()
        for others in (strangers, *elsewhere):
            others.close()
    assert [one.returncode for one in (*first, *second)] == [0, 0], texts
    assert "connections to the coordinator were not of this run, and were refused" in texts[0][0]
    assert digest(out) == expected
    assert grown < 32 << 20, f"{grown >> 20} MiB"


@pytest.mark.parametrize(
    ("start", "is_silent"),
    [
        (["-m", "unlocked", "train", "--stages", "2"], True),
        (["-m", "unlocked", "launch", "--nproc-per-node=2", "--"], False),
    ],
    ids=["train", "launch"],
)
def test_on_one_machine_nobody_listens_beyond_loopback(
    start: list[str], is_silent: bool, expected: str, tmp_path: Path
) -> None:
    out = tmp_path / "summary.json"
    process = subprocess.Popen([sys.executable, *start, *FLAGS, "--summary", str(out)], env=ENVIRONMENT)
    try:
        seen: set[tuple[str, int]] = set()
        while process.poll() is None:
            seen |= listening(tree(process.pid))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert digest(out) == expected
    assert {address for address, _ in seen} <= LOOPBACK
    assert (not seen) is is_silent


CROWD = 2000
FEW_FILES = ["sh", "-c", 'ulimit -Sn 1024; exec "$@"', "sh"]  # as many as a process has by default


def test_a_crowd_at_rank_0s_ports_amid_a_run_changes_nothing(tmp_path: Path) -> None:
    """2,000 connections that say nothing: to the coordinator, and to the store, whose server takes whoever comes."""
    out, coordinator, store = tmp_path / "summary.json", free_port(), free_port()
    command = [str(PIPELINE), *LONG, "--summary", str(out), "--coordinator-port", str(coordinator)]
    with ranks(2, command, port=store, prefix=FEW_FILES) as started, contextlib.ExitStack() as stack:
        assert started[0].stdout is not None
        next(line for line in started[0].stdout if line.startswith("epoch 1/"))
        folder = Path(f"/proc/{started[0].pid}/fd")
        before, files = memory(started[0].pid), len(list(folder.iterdir()))
        for number in range(CROWD):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", (coordinator, store)[number % 2]))
        next(line for line in started[0].stdout if line.startswith("epoch 3/"))
        grown, more = memory(started[0].pid) - before, len(list(folder.iterdir())) - files
        texts = [one.communicate(timeout=240) for one in started]
    assert [one.returncode for one in started] == [0, 0], texts
    assert grown < 32 << 20, f"{grown >> 20} MiB"
    assert more < 100, "who comes amid a run takes no descriptor"
    assert digest(out) == digest_of(LONG, tmp_path)


def test_a_crowd_at_the_store_before_the_run_leaves_enough_descriptors(expected: str, tmp_path: Path) -> None:
    out, store = tmp_path / "summary.json", free_port()
    command = [str(PIPELINE), *FLAGS, "--summary", str(out)]
    with ranks(2, command, port=store, prefix=FEW_FILES, only=[0]) as first, contextlib.ExitStack() as stack:
        deadline = time.monotonic() + 120
        while len(listening([first[0].pid])) < 3:  # the store, the roll call, the coordinator
            assert time.monotonic() < deadline
            assert first[0].poll() is None
        for _ in range(CROWD):
            stack.enter_context(socket.create_connection(("127.0.0.1", store), timeout=20))
        with ranks(2, command, port=store, prefix=FEW_FILES, only=[1]) as second:
            texts = [one.communicate(timeout=240) for one in (*first, *second)]
    assert [one.returncode for one in (*first, *second)] == [0, 0], texts
    assert digest(out) == expected
