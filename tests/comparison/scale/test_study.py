"""The tables of many stages: bytes as a real connection carries them, and rows that agree with each other."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from coordination import LAYERS, until
from strangers import recorded

from unlocked.comparison.scale.study import Assumptions, Link, log_slots, study
from unlocked.comparison.scale.traffic import coordinator_traffic, wire_bytes
from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.engines.processes.options import MOST_SLOTS

ROOT = Path(__file__).parents[3]
NEAR, FAR = Link("near", 1e-5, 12.5e9), Link("far", 20e-3, 125e6)


@pytest.mark.alone
@pytest.mark.parametrize(
    "message", [m.Beat(position=5), m.Failure(stage=0, rank=0, layer="a", action="F", message="x" * 500)]
)
def test_a_message_has_as_many_bytes_on_a_real_connection(message: object) -> None:
    """Of a stranger that has the keys: the coordinator counts what it says, and does nothing about it."""
    with Coordinator(LAYERS[:1], 50) as coordinator, zmq.Context() as context:
        address = Address.parse(coordinator.address)
        port = int(address.endpoint.rpartition(":")[2])
        with recorded("127.0.0.1", port) as (relayed, heard):
            dealer, monitor = dial(context, Address(f"tcp://127.0.0.1:{relayed}", address.public_key), KeyPair.new())
            dealer.send(m.pack(message))
            until(lambda: coordinator.ignored_frames == 1)
            before = len(heard)
            for _ in range(10):
                dealer.send(m.pack(message))
            until(lambda: coordinator.ignored_frames == 11)
            assert len(heard) - before == 10 * wire_bytes(message)
            dealer.disable_monitor()
            monitor.close(linger=0)
            dealer.close(linger=0)


def test_the_coordinator_hears_of_each_stage_alike_and_pings_a_thousand_less_often() -> None:
    small, large = coordinator_traffic(8, 50.0), coordinator_traffic(1024, 50.0)
    assert small.heard == 8 * (5 + 2)
    assert large.heard == 128 * small.heard
    assert coordinator_traffic(8, 0.5).heard == 8 * (0.5 + 2), "slow stages have no progress to tell of"
    assert 8 * 8 < small.said < 8 * 8 + 8 * 3, "pings to 16, and a window or two to 8"
    assert 2048 < large.said < 2048 + 1024 * 3
    assert coordinator_traffic(8, 50.0, layers=4).heard_bytes > small.heard_bytes


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return study(Assumptions(), [4, 16], [NEAR, FAR], [365.0, 0.1])


def test_a_slow_link_and_failures_cost_who_waits_most(found: dict[str, Any]) -> None:
    rates = {
        (row["stages"], row["link"], row["schedule"]): row["microbatches_per_second"] for row in found["throughput"]
    }
    for stages in (4, 16):
        lost = {
            name: rates[stages, "far", name] / rates[stages, "near", name]
            for name in ("local", "1F1B", "ZB-H1", "PipeDream-2BW")
        }
        assert max(lost, key=lambda name: lost[name]) == "local"
        assert rates[stages, "far", "PipeDream-2BW"] > rates[stages, "far", "1F1B"]
        # One transfer at a time: 20 ms and 1 MiB at 1 Gbit/s.
        assert rates[stages, "far", "local"] == pytest.approx(1 / (20e-3 + (1 << 20) / 125e6))
    rare, often = found["failures"][2:]
    assert rare["all_go_back"] > often["all_go_back"]
    assert often["stage_goes_back"] > often["all_go_back"]
    assert often["hours_between_failures"] == pytest.approx(24 * 0.1 / 16)


def test_a_log_is_what_an_edge_may_have_and_the_run_uses(found: dict[str, Any]) -> None:
    assert log_slots(1 << 20) == 256
    assert log_slots(1) == MOST_SLOTS
    for row in found["memory"]:
        assert row["bytes_per_edge"] == 256 << 20
        assert row["used_bytes_per_edge"] <= row["bytes_per_edge"] / 2
        assert row["bytes"] == (row["stages"] - 1) * row["bytes_per_edge"]


@pytest.fixture
def scale() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("scale")
    sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_has_the_tables_that_the_benchmark_makes(scale: Any) -> None:
    """Of eight stages, which take a second."""
    text = (ROOT / "docs" / "scale.md").read_text()
    made = study(Assumptions(), [8], [scale.link(one) for one in scale.LINKS], [365.0, 30.0, 1.0])
    for name, make in scale.TABLES.items():
        assert f"<!-- table: {name} -->" in text
        for row in make(made).splitlines():
            assert row in text, f"{name}: run benchmarks/scale.py --update docs/scale.md"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--links", "near:fast:1"], "near:fast:1 is not NAME:LATENCY:BANDWIDTH"),
        (["--links", "near:-1:1"], "a latency [s] or bandwidth"),
        (["--forward", "0"], "forward"),
        (["--mtbf-days", "0"], "mtbf"),
        (["--stages", "0"], "num_stages=0"),
    ],
)
def test_a_mistake_is_one_line(
    scale: Any, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = scale.main(["--stages", "2", *arguments])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
