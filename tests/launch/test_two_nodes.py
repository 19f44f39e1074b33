"""Two nodes with a network between them: a stage of the second one comes back; a link that is cut ends the run."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from network_nodes import Node, two_nodes
from ranks import ENVIRONMENT, PIPELINE, first_error, free_port

from unlocked.runtime.faults import VARIABLE

pytestmark = pytest.mark.alone

TIMEOUT = 6  # of the edges; a process counts as lost after half of it
SECONDS = 15  # in which all must have ended: the timeout, last words, and what a busy machine adds
FLAGS = ["--plain", "--dataset", "digits", "--batch-size", "100", "--timeout", str(TIMEOUT), "--transport", "group"]


@contextmanager
def ranks_on(nodes: tuple[Node, Node], flags: list[str], faults: str = "") -> Iterator[list[subprocess.Popen[str]]]:
    """Rank 0 on the first node, ranks 1 and 2 on the second."""
    port, started = free_port(), []
    for rank, local in enumerate((0, 0, 1)):
        node = nodes[min(rank, 1)]
        world = {"WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 1 + min(rank, 1), "RANK": rank, "LOCAL_RANK": local}
        own = {**world, "MASTER_ADDR": nodes[0].address, "MASTER_PORT": port, VARIABLE: faults}
        environment = ENVIRONMENT | node.environment | {name: str(value) for name, value in own.items()}
        command = [*node.prefix, sys.executable, str(PIPELINE), *FLAGS, *flags]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_a_killed_stage_of_the_second_node_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    flags = ["--num-epochs", "2", "--summary"]
    alone = [sys.executable, str(PIPELINE), "--plain", "--dataset", "digits", "--batch-size", "100", *flags]
    plain = subprocess.Popen([*alone, str(tmp_path / "plain.json"), "--engine", "sequential"], env=ENVIRONMENT)
    with two_nodes(tmp_path) as nodes, ranks_on(nodes, [*flags, str(tmp_path / "run.json")], "kill@1F9") as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0, 0], texts
    assert plain.wait(60) == 0
    run, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "plain"))
    assert run["weights_sha256"] == expected["weights_sha256"]
    assert [(one["stage"], one["cause"]) for one in run["recoveries"]] == [(1, "was ended by SIGKILL")]


def test_a_link_that_is_cut_for_good_ends_the_run_on_both_nodes(tmp_path: Path) -> None:
    flags = ["--num-epochs", "100000", "--no-eval", "--print-freq", "5", "--save-path", str(tmp_path)]
    with two_nodes(tmp_path) as nodes, ranks_on(nodes, [*flags, "--experiment-name", "run"]) as started:
        log = tmp_path / "run" / "train.log"
        deadline = time.monotonic() + 120
        while not (log.exists() and "Epoch: [0]" in log.read_text()):
            assert all(process.poll() is None for process in started)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        nodes[1].cut()
        began = time.monotonic()
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
        assert time.monotonic() - began < SECONDS
        assert [process.returncode for process in started] == [1, 1, 1], texts
        assert [node.processes() for node in nodes] == [[], []]
    here, *there = map(first_error, texts)
    assert here.startswith(("error: stage 1 (rank 1: ", "error: stage 2 (rank 2: ")), texts
    assert f"no heartbeat for {TIMEOUT // 2} s" in here
    assert all("stage 0 (rank 0: " in line and f"is silent for {TIMEOUT // 2} s" in line for line in there), texts
