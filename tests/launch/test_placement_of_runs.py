"""Placement by what layers and links take: over a slow link, on one machine, and with files that don't fit."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from namespaces import Link, Machine, machines, why_not
from placement_worker import ROWS, WIDTHS
from ranks import ENVIRONMENT, PIPELINE, free_port

from unlocked.launch import pipeline
from unlocked.runtime.schedules.partition import partition
from unlocked.runtime.schedules.placement import Placement
from unlocked.runtime.schedules.placement_file import read_placement

WORKER = Path(__file__).with_name("placement_worker.py")
STEPS = 120
SECONDS, BITS_PER_SECOND = 0.02, 100e6
PLACES = [0, 1, 0, 2]  # the machine of each rank


def run_on(made: Sequence[Machine], steps: int, folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """What rank 0 wrote, and what it said."""
    processes = []
    for rank, place in enumerate(PLACES):
        (folder / str(place)).mkdir(exist_ok=True)  # what is temporary on this machine
        where = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(PLACES)),
            "LOCAL_RANK": str(PLACES[:rank].count(place)),
            "LOCAL_WORLD_SIZE": str(PLACES.count(place)),
            "MASTER_ADDR": made[0].address,
            "MASTER_PORT": "29500",
            "TMPDIR": str(folder / str(place)),
        }
        files = [str(folder / f"{name}.json"), str(folder / "placement.json"), str(folder / f"{name}.trace.json")]
        command = [sys.executable, str(WORKER), "processes", str(steps), *files]
        processes.append(made[place].start(command, ENVIRONMENT | where))
    texts = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), texts
    return json.loads((folder / f"{name}.json").read_text()), texts[0]


def pace_of(trace: Path, stage: int) -> float:
    """Seconds between two updates of a stage: the median, so that neither the beginning counts nor a moment in which
    the machine had something else to do."""
    events = json.loads(trace.read_text())["traceEvents"]
    times = sorted(event["ts"] for event in events if event.get("tid") == stage and f"{stage}U" in event["name"])
    return 1e-6 * median(after - before for before, after in pairwise(times))


@pytest.mark.alone
@pytest.mark.skipif(bool(why_not()), reason=f"machines can't be made of namespaces: {why_not()}")
def test_a_slow_link_has_the_boundary_moved_to_where_little_passes(tmp_path: Path) -> None:
    """Three machines; the link to the last one has 20 ms and 100 Mbit/s, and its ranks are not in the machines' order.
    The second run finds the placement of the first."""
    command = [sys.executable, str(WORKER), "sequential", str(STEPS), str(tmp_path / "plain.json")]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    with machines(3, links={2: Link(SECONDS, BITS_PER_SECOND)}) as made:
        told, said = run_on(made, STEPS, tmp_path, "first")
        again, said_again = run_on(made, 3, tmp_path, "second")
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert told["weights_sha256"] == plain["weights_sha256"]
    assert "stages 0, 1, ... are run by ranks 0, 2, 1, 3" in said

    placement = read_placement(tmp_path / "placement.json")
    by_compute = [len(part) for part in partition([1.0] * len(WIDTHS), len(PLACES))]  # the layers are alike
    assert told["stages"][-1] == len(WIDTHS) - 1 - WIDTHS.index(128)
    assert by_compute[-1] < told["stages"][-1], "nothing had to be moved"
    assert again["stages"] == told["stages"]
    assert "links between ranks: 0-1" in said
    assert "links between ranks" not in said_again

    assert [machine.processes for machine in placement.machines] == [2, 1, 1]
    *_, slow = placement.links
    assert slow is not None
    assert slow.latency == pytest.approx(SECONDS, rel=0.15)
    assert slow.bandwidth == pytest.approx(BITS_PER_SECOND / 8, rel=0.15)
    # The link is what takes longest, by far: so the pace is its own, whatever else the machine has to do.
    pace = pace_of(tmp_path / "first.trace.json", len(PLACES) - 1)
    print(f"predicted {ROWS / placement.pace(4):.0f}, measured {ROWS / pace:.0f} images/s; whole run: {told}")
    assert ROWS / pace == pytest.approx(ROWS / placement.pace(4), rel=0.15)
    assert told["predicted_images_per_second"] == pytest.approx(ROWS / placement.pace(4), rel=0.15)
    assert 0 < told["images_per_second"] < 1.15 * told["predicted_images_per_second"]


@pytest.mark.alone
def test_auto_starts_as_many_processes_as_pay(tmp_path: Path) -> None:
    flags = ["--dataset", "digits", "--max-steps", "10", "--no-eval", "--threads", "1", "--no-save", "--plain"]
    outs = [tmp_path / name for name in ("auto.json", "again.json", "plain.json")]
    filed = ["--stages", "auto", "--placement", str(tmp_path / "placement.json")]
    texts = []
    for out, more in zip(outs, (filed, filed, ["--engine", "sequential"]), strict=True):
        command = [sys.executable, str(PIPELINE), *flags, *more, "--summary", str(out)]
        clean = {key: value for key, value in ENVIRONMENT.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts.append(done)
    auto, again, plain = (json.loads(out.read_text()) for out in outs)
    assert auto["weights_sha256"] == again["weights_sha256"] == plain["weights_sha256"]
    assert auto["stages"] == again["stages"]
    assert len(auto["stages"]) <= min(5, len(os.sched_getaffinity(0)))
    assert f"stages auto: {len(auto['stages'])} of at most" in texts[0].stderr
    assert "stages auto" not in texts[1].stderr, "it was measured before"
    assert auto["predicted_images_per_second"] > 0
    predicted = f"images/s, predicted -> measured: {auto['predicted_images_per_second']:.0f} -> "
    assert predicted in texts[0].stdout


TINY = ["--engine", "processes", "--plain", "--num-epochs", "1", "--max-steps", "1", "--no-eval", "--no-save"]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A run of one process; its exit code, and what it says to standard error."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in world.items():
        monkeypatch.setenv(name, value)

    def run(*flags: str) -> tuple[int, str]:
        capsys.readouterr()
        code = pipeline.main([*TINY, *flags])
        return code, capsys.readouterr().err

    return run


def test_a_placement_of_another_run_is_refused_in_one_line(
    train: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    path = tmp_path / "placement.json"
    assert train("--placement", str(path))[0] == 0
    whole = json.loads(path.read_text())
    assert train("--placement", str(path))[0] == 0
    assert json.loads(path.read_text()) == whole

    two: dict[str, Any] = {"stages": [["conv1", "conv2"], ["conv3", "linear1", "output"]]}
    two["machines"] = [{"processes": 2, "cores": 2}]
    fewer = json.loads(json.dumps(whole))
    fewer["layers"][1]["output_bytes"] -= 1
    unfit: list[tuple[dict[str, Any], Sequence[str], str]] = [
        (whole, ["--model", "VGG8"], "is of another network: its layers are conv1, conv2, conv3, linear1, output, "),
        (whole, ["--batch-size", "32"], "was measured with micro-batches of 64 rows, this run has 32"),
        (whole | two, [], "is for 2 processes on one machine, this run has 1 process on one machine"),
        (fewer, [], "bytes leave layer conv2"),
        (whole | {"batch_size": -1}, [], "is damaged, or no placement: batch_size is -1"),
    ]
    for content, flags, words in unfit:
        path.write_text(json.dumps(content))
        code, said = train("--placement", str(path), *flags)
        assert code == 2, words
        assert said.startswith("error: placement "), said
        assert words in said
        assert said.count("\n") == 1
    path.write_text(json.dumps(whole)[:200])
    code, said = train("--placement", str(path))
    assert (code, said.count("\n")) == (2, 1)


def test_the_placement_read_has_the_machines_of_the_run(tmp_path: Path, train: Callable[..., tuple[int, str]]) -> None:
    path = tmp_path / "below" / "placement.json"
    assert train("--placement", str(path))[0] == 0
    placement: Placement = read_placement(path)
    assert [machine.processes for machine in placement.machines] == [1]
    assert placement.links == ()
    assert [layer.output_bytes > 0 for layer in placement.layers] == [True] * 4 + [False]
    with contextlib.suppress(AttributeError):  # where the system can't tell
        assert placement.machines[0].cores == len(os.sched_getaffinity(0))
