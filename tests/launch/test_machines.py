"""Runs over several machines, each a set of Linux namespaces: a network, a name that nobody can resolve, and a memory
of its own."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from namespaces import Machine, machines, why_not
from ranks import ENVIRONMENT, PIPELINE

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(bool(why_not()), reason=f"machines can't be made of namespaces: {why_not()}"),
]

FLAGS = ["--dataset", "digits", "--max-steps", "20", "--threads", "1", "--plain"]
PORT = 29500
YEAR = 365 * 24 * 3600


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plain loop's digest."""
    out = tmp_path_factory.mktemp("sequential") / "summary.json"
    command = [sys.executable, str(PIPELINE), "--engine", "sequential", *FLAGS, "--summary", str(out)]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return str(json.loads(out.read_text())["weights_sha256"])


@contextlib.contextmanager
def started(
    made: Sequence[Machine],
    places: Sequence[int],
    flags: Sequence[str],
    *,
    folder: Path,
    own: Mapping[int, Mapping[str, str]] | None = None,
) -> "Iterator[list[subprocess.Popen[str]]]":
    """A run with a rank for every entry of `places`, which is the number of its machine.

    Args:
        own: more variables, by machine.
    """
    processes = []
    for rank, place in enumerate(places):
        (folder / str(place)).mkdir(exist_ok=True)  # what is temporary on this machine
        where = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(places[:rank].count(place)),
            "LOCAL_WORLD_SIZE": str(places.count(place)),
            "MASTER_ADDR": made[0].address,
            "MASTER_PORT": str(PORT),
            "TMPDIR": str(folder / str(place)),
        }
        command = [sys.executable, str(PIPELINE), *flags]
        processes.append(made[place].start(command, ENVIRONMENT | where | dict((own or {}).get(place, {}))))
    yield processes


def outputs(processes: "Sequence[subprocess.Popen[str]]") -> list[tuple[str, str]]:
    texts = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return texts


def listening(machine: Machine) -> set[str]:
    """The addresses that something listens on there, as proc(5) writes them."""
    script = "cat /proc/net/tcp /proc/net/tcp6"
    text = subprocess.run(machine.command(["sh", "-c", script]), capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in text.splitlines()]
    return {words[1].partition(":")[0] for words in lines if words[3] == "0A"}


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that, loaded before others, sets a process's clock ahead by a year."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(
        "#define _GNU_SOURCE\n#include <time.h>\n#include <unistd.h>\n#include <sys/syscall.h>\n"
        "int clock_gettime(clockid_t which, struct timespec *at) {\n"
        "    int failed = syscall(SYS_clock_gettime, which, at);\n"
        f"    if (!failed && which == CLOCK_REALTIME) at->tv_sec += {YEAR};\n"
        "    return failed;\n}\n"
    )
    library = folder / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "clock.c"], check=True)
    return str(library)


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6 alone"])
def test_five_stages_on_three_machines_have_the_plain_loops_bits(
    ipv6: bool, clock: str, expected: str, tmp_path: Path
) -> None:
    """Two stages, two and one; the clock of the second machine is a year ahead."""
    out, trace = tmp_path / "summary.json", tmp_path / "trace.json"
    with machines(3, ipv6=ipv6) as made:
        flags = [*FLAGS, "--summary", str(out), "--trace", str(trace)]
        with started(made, [0, 0, 1, 1, 2], flags, folder=tmp_path, own={1: {"LD_PRELOAD": clock}}) as processes:
            seen: set[str] = set()
            while processes[0].poll() is None:
                seen |= listening(made[0])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[0].wait(0.2)
            outputs(processes)
    summary = json.loads(out.read_text())
    assert summary["weights_sha256"] == expected
    assert len(summary["stages"]) == 5
    assert seen
    assert not seen & {"00000000", "0" * 32}, "nothing listens on every interface"
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if "ts" in event]
    assert {event["tid"] for event in events} == set(range(5))
    assert max(event["ts"] for event in events) < 600e6, "of a run of seconds"
    assert not [line for machine in range(3) for line in (tmp_path / str(machine)).glob("unlocked-*/weights")]
