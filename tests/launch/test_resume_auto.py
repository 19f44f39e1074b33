"""The same command line begins a run, goes on with it after any end, and comes to the same bits."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import PIPELINE, first_error, ranks, torchrun
from test_recovery import await_line, worker_pid

from unlocked.launch.pipeline import main
from unlocked.runtime.saving.snapshots import find_snapshot, newest_whole

FLAGS = ["--plain", "--dropout", "0.2", "--num-epochs", "3", "--batch-size", "100", "--snapshot-every", "7"]
AUTO = [*FLAGS, "--resume", "auto"]


def folder(root: Path, name: str) -> list[str]:
    return ["--save-path", str(root), "--experiment-name", name, "--summary", str(root / f"{name}.json")]


def summary(root: Path, name: str) -> dict:
    return dict(json.loads((root / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has cut: its summary, and its snapshots after 7, 14, ... 42 of 45 steps."""
    root = tmp_path_factory.mktemp("whole")
    assert main([*AUTO, *folder(root, "run")]) == 0
    return root


def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run" / "snapshots"


def test_auto_takes_the_newest_whole_snapshot_and_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = copied(whole, tmp_path)
    (snapshots / "step-00000042" / "layer-001-conv2.pt").write_bytes(b"no weights")
    (snapshots / "step-00000035" / "manifest.json").write_text("{")
    (snapshots / "step-00000028" / "layer-004-output.pt").unlink()
    assert main([*AUTO, *folder(tmp_path, "run")]) == 0
    text = capsys.readouterr().err
    assert f"resuming from {snapshots / 'step-00000021'}, since" in text
    assert "layer-001-conv2.pt is damaged" in text
    assert summary(tmp_path, "run")["weights_sha256"] == summary(whole, "run")["weights_sha256"]


def test_a_plain_resume_of_a_damaged_snapshot_names_the_whole_one_before(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = copied(whole, tmp_path)
    (snapshots / "step-00000042" / "layer-001-conv2.pt").write_bytes(b"no weights")
    (snapshots / "step-00000035" / "layer-001-conv2.pt").unlink()
    assert main([*FLAGS, *folder(tmp_path, "run"), "--resume", str(snapshots)]) == 2
    assert f"the newest whole snapshot before it is {snapshots / 'step-00000028'}" in capsys.readouterr().err


def test_auto_does_not_begin_anew_where_all_is_damaged(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for manifest in copied(whole, tmp_path).glob("*/manifest.json"):
        manifest.write_text("{")
    assert main([*AUTO, *folder(tmp_path, "run")]) == 2
    assert "remove them to start anew" in capsys.readouterr().err


def test_auto_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(AUTO) == 2
    assert "--save-path" in capsys.readouterr().err


def test_old_snapshots_and_what_dead_runs_left_are_removed(whole: Path, tmp_path: Path) -> None:
    snapshots = copied(whole, tmp_path)
    (snapshots / "step-00000049").mkdir()
    (snapshots / "step-00000049" / "layer-000-conv1.pt").write_bytes(b"alone")
    (snapshots / "step-00000042" / ".writing-0123abcd-layer-000-conv1.pt").write_bytes(b"half")
    (tmp_path / "run" / ".writing-0123abcd-model_final.pt").write_bytes(b"half")
    (snapshots / "step-00000042" / "manifest.json").unlink()
    assert main([*AUTO, "--keep-snapshots", "2", *folder(tmp_path, "run")]) == 0
    assert sorted(path.name for path in snapshots.iterdir()) == ["step-00000035", "step-00000042"]
    assert not list((tmp_path / "run").rglob(".writing-*"))
    snapshot, problems = newest_whole(snapshots)
    assert snapshot is not None
    assert (snapshot.steps, problems) == (42, [])


@pytest.mark.alone
@pytest.mark.parametrize("engine", ["sequential", "streams", "processes"])
def test_a_stopped_run_goes_on_from_where_it_stopped(engine: str, tmp_path: Path) -> None:
    """By SIGTERM, as where a machine is taken back; then by the same command line, on the same engine."""
    flags = ["--plain", "--num-epochs", "60", "--batch-size", "100", "--resume", "auto"]
    assert main([*flags, *folder(tmp_path, "whole")]) == 0
    command = [str(PIPELINE), *flags, *folder(tmp_path, "cut"), "--engine", engine]
    size = 2 if engine == "processes" else 1
    with ranks(size, command) as started:
        output = started[0].stdout
        assert output is not None
        assert any("epoch 1/" in line for line in output)
        for process in started:
            process.send_signal(signal.SIGTERM)
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [143] * size, texts
    saved = find_snapshot(tmp_path / "cut" / "snapshots")
    assert 15 <= saved.steps < 900
    with ranks(size, command) as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [0] * size, texts
    assert not any(first_error(text) for text in texts)
    ended, expected = summary(tmp_path, "cut"), summary(tmp_path, "whole")
    assert ended["weights_sha256"] == expected["weights_sha256"]
    assert ended["epoch_results"][-1] == expected["epoch_results"][-1]
    assert torch.load(tmp_path / "cut" / "model_final.pt", weights_only=True)


@pytest.mark.alone
def test_torchrun_brings_a_run_to_its_end_although_rank_0_is_killed_twice(tmp_path: Path) -> None:
    """No step by hand in between; snapshots come by the clock."""
    flags = ["--plain", "--dropout", "0.2", "--num-epochs", "48", "--batch-size", "100", "--resume", "auto"]
    assert main([*flags, *folder(tmp_path, "whole")]) == 0
    flags += ["--snapshot-every", "0.1s", *folder(tmp_path, "cut")]
    with torchrun(2, [str(PIPELINE), *flags], restarts=3) as process:
        for epoch in (6, 24):
            await_line(process, f"^epoch {epoch}/48")
            os.kill(worker_pid(process.pid, 0), signal.SIGKILL)
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 0, text
    ended, expected = summary(tmp_path, "cut"), summary(tmp_path, "whole")
    assert ended["weights_sha256"] == expected["weights_sha256"]
    assert ended["epoch_results"][-1] == expected["epoch_results"][-1]
    assert (ended["steps"], ended["first_step"] > 0) == (720, True)
    log = (tmp_path / "cut" / "train.log").read_text()
    assert log.count("Resumed at position") == 2
