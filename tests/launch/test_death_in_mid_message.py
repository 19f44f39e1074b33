"""A worker dies while a message is half way over a slow link: the other end is not left waiting for the rest of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import Link, machines, why_not
from ranks import ENVIRONMENT, PIPELINE

from unlocked.runtime.faults import VARIABLE

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(bool(why_not()), reason=f"machines can't be made of namespaces: {why_not()}"),
]

# 1.4 MB a message, over half a second on the link. (That a sender dies in its midst: tests/engines/test_pair_links.py.)
FLAGS = ["--plain", "--dataset", "digits", "--batch-size", "700", "--num-epochs", "4", "--no-eval", "--timeout", "60"]
LINK = Link(seconds=0.001, bits_per_second=20e6)
SECONDS = 50  # of a run: less than the 60 after which an edge gives up


def test_it_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    alone = [sys.executable, str(PIPELINE), *FLAGS, "--engine", "sequential", "--summary", str(tmp_path / "plain.json")]
    subprocess.run(alone, env=ENVIRONMENT, check=True, capture_output=True)
    flags = [*FLAGS, "--stages", "0,1-4", "--transport", "group", "--summary", str(tmp_path / "run.json")]
    with machines(2, links={1: LINK}) as made:
        started = []
        for rank, machine in enumerate(made):
            numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29500}
            world = {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": made[0].address}
            command = [sys.executable, str(PIPELINE), *flags]
            started.append(machine.start(command, ENVIRONMENT | world | {VARIABLE: "kill@1F3"}))
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    run, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("run", "plain"))
    assert run["weights_sha256"] == expected["weights_sha256"]
    assert [(one["stage"], one["cause"]) for one in run["recoveries"]] == [(1, "was ended by SIGKILL")]
