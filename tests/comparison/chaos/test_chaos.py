"""Faults are drawn reproducibly, told in a table, and a run under them comes to the undisturbed bits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unlocked.comparison.chaos.arming import Armoury
from unlocked.comparison.chaos.campaign import new_campaign
from unlocked.comparison.chaos.kinds import KINDS
from unlocked.comparison.chaos.options import ChaosOptions
from unlocked.comparison.chaos.records import Campaign, FaultRecord, RunRecord, format_table
from unlocked.comparison.chaos.report import join, read_report, update_report
from unlocked.comparison.chaos.tree import Tree
from unlocked.comparison.environment import environment
from unlocked.launch import chaos
from unlocked.launch.console import COMMANDS
from unlocked.runtime.fault_fixtures import FailAt
from unlocked.runtime.faults import faults_from_environment
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan

pytest_plugins = ["unlocked.runtime.fault_fixtures"]
PLAN = StreamPlan(epochs=3, train_size=20, batch_size=4, eval_size=8, eval_batch_size=4, snapshot_every=3)


def test_faults_are_drawn_reproducibly_and_exist() -> None:
    options = ChaosOptions(at_actions=0.5, chaos_seed=3)
    first, second = (Armoury(options, PLAN, 3) for _ in range(2))
    first.furthest = second.furthest = 12
    drawn = [first.draw(10) for _ in range(200)]
    assert [second.draw(10) for _ in range(200)] == drawn
    timed = [one for one in drawn if not one.faults]
    assert {one.kind for one in timed} == set(KINDS)
    assert 5 < sum(one.seconds for one in timed) / len(timed) < 20
    typed = [one for one in drawn if one.faults]
    assert {one.moment for one in typed} == {"steady state", "snapshot", "evaluation", "replay"}
    actions = [set(stage_actions(stage, 3, PLAN.items(10))) for stage in range(3)]
    for one in typed:
        assert all(fault.action in actions[fault.action.stage] for fault in one.faults)
        assert [fault.incarnation for fault in one.faults] == [0, 1][: len(one.faults)]
        is_again = len(one.faults) == 2 or one.faults[0].action.microbatch < 12
        assert (one.moment == "replay") == is_again


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "2", "--mtbf", "7"], "mtbf is '7'; it must be a time"),
        (["--stages", "2", "--faults", "kill,flood"], "faults are 'kill,flood'; valid: kill, segv"),
        (["--stages", "2", "--fault-count", "0"], "fault_count is 0"),
        (["--stages", "2", "--lr", "much"], "--lr"),
        (["--stages", "2", "--resume", "auto"], "--resume is set for every run by itself"),
        (["--engine", "streams"], "give --stages N"),
        ([], "--stages"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(flags) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    assert words in text


def test_the_table_and_what_is_not_well() -> None:
    campaign = Campaign(
        command=["train"],
        options={},
        stages=2,
        environment=environment(),
        undisturbed_seconds=10.0,
        weights_sha256="ab",
        mean_seconds_between_faults=5.0,
    )
    good = {"is_exact": True, "epochs_are_exact": True}
    campaign.runs += [RunRecord(starts=3, seconds=30.0, **good), RunRecord(starts=1, seconds=10.0, **good)]
    campaign.faults += [
        FaultRecord(kind="kill", moment="set-up", rank=1, outcome="restarted", seconds=1.0),
        FaultRecord(kind="kill", moment="replay", rank=0, outcome="recovered", seconds=3.0),
        FaultRecord(kind="link", moment="steady state", rank=0, outcome="unharmed", seconds=8.0),
    ]
    assert campaign.ettr == 0.5
    assert campaign.problems == []
    table = format_table([campaign])
    assert "kill                2          1          1          0          0          0       2.00" in table
    assert "2 of 2 runs came to the undisturbed weights and epochs, in 4 starts" in table
    assert "2 processes         3" in table
    assert "effective training time 0.500 at a fault every 5 s of 2 processes" in table
    campaign.runs[0].is_exact = campaign.runs[1].epochs_are_exact = False
    campaign.faults[0].named, campaign.faults[1].hung, campaign.faults[2].orphans = False, True, 2
    assert [problem.split(":")[0] for problem in campaign.problems] == [
        *("run 0", "run 1"),
        "fault 0 (kill in set-up)",
        "fault 1 (kill in replay)",
        "fault 2 (link in steady state)",
    ]


def test_campaigns_add_up_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    assert read_report(path) == []
    options = ChaosOptions(report=path, fault_count=7)
    two, three = (new_campaign(["python", "train", str(stages)], stages, options) for stages in (2, 3))
    two.faults.append(FaultRecord(kind="kill", moment="set-up", rank=1, outcome="restarted", seconds=1.0))
    two.is_interrupted = True
    assert update_report(path, two) == [two]
    found = read_report(path)
    assert found == [two]
    again = new_campaign(["python", "train", "2"], 2, ChaosOptions(report=path, fault_count=9))
    assert join(found, again) is found[0]
    assert not found[0].is_interrupted
    assert join(found, three) is three
    assert update_report(path, three) == [two, three]
    two.faults.append(FaultRecord(kind="segv", moment="replay", rank=0))
    assert update_report(path, two) == read_report(path) == [two, three]
    path.write_text('{"campaigns": [{"stages": 2}]}')
    with pytest.raises(ValueError, match=r"report.json is no report of faults that could be added to"):
        read_report(path)


def test_the_fixture_arms_faults_for_one_test(fail_at: FailAt) -> None:
    one, two = fail_at(1, "SEND", 17), fail_at(0, "E", 3, kind="stop", incarnation=2)
    assert faults_from_environment() == [one, two]
    assert [str(one), str(two)] == ["kill@1SEND17", "stop@0E3#2"]
    with pytest.raises(ValueError, match="no action"):
        fail_at(0, "REST")


def test_no_fault_is_left_of_another_test() -> None:
    assert faults_from_environment() == []


@pytest.mark.alone
def test_a_run_under_faults_comes_to_the_undisturbed_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "chaos" in COMMANDS
    flags = ["--stages", "2", "--num-epochs", "2", "--batch-size", "100", "--save-path", str(tmp_path / "runs")]
    faults = ["--faults", "kill,preempt", "--fault-count", "2", "--mtbf", "2s", "--at-actions", "0.4"]
    for _ in range(2):  # the second one goes on, with nothing left to do
        code = chaos.main([*flags, *faults, "--hang-limit", "60", "--report", str(tmp_path / "report.json")])
        out = capsys.readouterr().out
        assert code == 0, out
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["problems"] == []
        [campaign] = report["campaigns"]
        assert len(campaign["faults"]) == 2
        assert all(run["is_exact"] and run["epochs_are_exact"] for run in campaign["runs"])
        assert report["ettr"][0] > 0
        assert report["table"][0].split()[0] == "faults"


@pytest.mark.alone
def test_a_kind_that_finds_nothing_to_strike_gives_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between workers that share memory no connection can be cut, and the first draw is that."""
    flags = ["--stages", "2", "--num-epochs", "60", "--batch-size", "100", "--save-path", str(tmp_path)]
    faults = ["--faults", "link,kill", "--fault-count", "1", "--mtbf", "1s", "--at-actions", "0"]
    assert chaos.main([*flags, *faults, "--hang-limit", "60"]) == 0
    out = capsys.readouterr().out
    assert "fault 1: kill" in out


@pytest.mark.alone
def test_a_campaign_that_is_told_to_end_takes_its_training_along(tmp_path: Path) -> None:
    flags = ["--stages", "2", "--dataset", "synthetic", "--num-epochs", "1000", "--save-path", str(tmp_path)]
    command = [sys.executable, "-m", "unlocked", "chaos", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as one:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("undisturbed-*/snapshots/step-*/manifest.json")):
            assert time.monotonic() < deadline, "it never trained"
        name = next(tmp_path.glob("undisturbed-*")).name
        assert len(Tree(name).processes()) > 2
        one.send_signal(signal.SIGTERM)
        assert one.communicate()[1] == "error: interrupted before the first fault\n"
    assert one.returncode == 130
    assert Tree(name).is_gone(10)
