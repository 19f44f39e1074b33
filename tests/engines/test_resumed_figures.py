"""What a resumed run tells of itself: the whole run, and which part of it was trained here; with how many threads."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import fit, trainer

from unlocked.launch.pipeline import main

ENGINES = ["sequential", "streams"]
STEPS = 5  # of an epoch of `fit`


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("cut", "epochs_here"), [(3, 3), (STEPS, 3), (7, 2), (10, 2)])
def test_a_result_tells_the_whole_run(engine: str, cut: int, epochs_here: int, tmp_path: Path) -> None:
    whole = fit(trainer(engine, snapshot_every=1, snapshot_dir=tmp_path), epochs=3)
    resumed = fit(
        trainer(engine, snapshot_every=1, resume=tmp_path / f"step-{cut:08d}", snapshot_dir=tmp_path), epochs=3
    )
    assert (whole.epochs_done, whole.steps, whole.first_step) == (3, 3 * STEPS, 0)
    assert (resumed.epochs_done, resumed.steps, resumed.first_step) == (3, 3 * STEPS, cut)
    assert len(resumed.epochs) == epochs_here
    assert resumed.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("engine", ENGINES)
def test_files_and_last_lines_tell_the_whole_run(engine: str, tmp_path: Path, capsys: Any) -> None:
    """Three epochs of 23 steps, of which the first is done and the second has begun."""
    flags = ["--engine", engine, "--plain", "--num-epochs", "3", "--snapshot-every", "30", "--save-path", str(tmp_path)]
    assert main([*flags, "--experiment-name", "whole"]) == 0
    text = capsys.readouterr().out
    assert "after 3 epochs\n69 micro-batches in" in text
    assert "images/s over the run" in text
    snapshot = tmp_path / "whole" / "snapshots" / "step-00000030"
    summary = tmp_path / "summary.json"
    resume = ["--experiment-name", "cut", "--resume", str(snapshot), "--summary", str(summary)]
    assert main([*flags, *resume]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  resumed after \d\d% of the run$", text, re.MULTILINE)
    assert "after 3 epochs\n69 micro-batches, 39 of them since the resume in" in text
    assert "images/s since the resume" in text
    found = json.loads(summary.read_text())
    assert (found["epochs"], found["steps"], found["first_step"]) == (3, 69, 30)
    assert [epoch["epoch"] for epoch in found["epoch_results"]] == [1, 2]
    assert set(found["threads"]) == {torch.get_num_threads()}
    last = (tmp_path / "cut" / "train.log").read_text().splitlines()[-1]
    figures = json.loads(last.removeprefix("Finished: "))
    assert (figures["epochs"], figures["steps"], figures["first_step"]) == (3, 69, 30)
    assert figures["threads"] == found["threads"]


@pytest.mark.parametrize("engine", ENGINES)
def test_another_number_of_threads_is_said_once(engine: str, tmp_path: Path) -> None:
    first = fit(trainer(engine, snapshot_every=STEPS, snapshot_dir=tmp_path), epochs=1)
    assert first.threads == [1] * len(first.stages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(trainer(engine, resume=tmp_path, snapshot_every=STEPS, snapshot_dir=tmp_path / "other"), epochs=2)
    again = trainer(engine, resume=tmp_path, snapshot_every=STEPS, snapshot_dir=tmp_path / "2", threads=2)
    with pytest.warns(UserWarning, match="2 threads where there were 1") as said:
        second = fit(again, epochs=2)
    assert second.threads == [2] * len(second.stages)
    (line,) = [str(one.message) for one in said]
    assert "2 threads where there were 1 (conv1, conv2, conv3, linear1, output)" in line
    assert "bits of its weights may differ" in line
    assert len(line.splitlines()) == 1
