"""`unlocked leaderboard` in real processes: cells as plain runs make them, kept, resumed, shared, failing alone."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unlocked.comparison.cells import claimed
from unlocked.comparison.leaderboard.options import parse
from unlocked.comparison.leaderboard.session import Session
from unlocked.launch.leaderboard import main
from unlocked.runtime.recipe import Recipe

pytestmark = pytest.mark.alone
FLAGS = ("--models", "MLP", "--model-width", "32", "--num-epochs", "1", "--seeds", "3")
FAST = ("--speed-steps", "4", "--repeats", "1")


def _cell(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "cells" / f"{name}.json").read_text())


def _digest(rule: str, seed: int) -> str:
    """Of the plain loop in this process."""
    recipe = Recipe(model="MLP", width=32, training_mode=rule, num_epochs=1, seed=seed, threads=1, plain=True)
    train, test = recipe.load_data()
    return recipe.fit(recipe.trainer(train), train, test).weights_sha256


def test_every_cell_is_the_plain_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*FLAGS, *FAST, "--rules", "LLS", "BP", "--output", str(tmp_path)]
    assert main(flags) == 0
    first = capsys.readouterr().out
    assert "MLP on digits: the best local rule is LLS" in first
    for rule in ("LLS", "BP"):
        training = _cell(tmp_path, f"digits_MLP_{rule}_3")["training"]
        assert training["weights_sha256"] == _digest(rule, 3)
        measures = _cell(tmp_path, f"digits_MLP_{rule}_measures")["measures"]
        is_local = rule == "LLS"
        assert (measures["inspection"]["leaks"] == []) == is_local
        assert measures["is_exact"] == (True if is_local else None)
        assert (measures["pipeline_images_per_second"] is not None) == is_local
    assert {path.name for path in tmp_path.glob("leader*")} == {"leaderboard.csv", "leaderboard.html"}
    # Once more: nothing is trained; one cell gone: that one alone, and with the same bits.
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert len(kept) == 4
    lost = tmp_path / "cells" / "digits_MLP_LLS_3.json"
    before = lost.read_text()
    lost.unlink()
    assert main(flags) == 0
    assert capsys.readouterr().out.count("seed 3: ") == 1
    assert {p: p.stat().st_mtime_ns for p in kept if p != lost} == {p: t for p, t in kept.items() if p != lost}
    digests = [json.loads(text)["training"]["weights_sha256"] for text in (before, lost.read_text())]
    assert digests[0] == digests[1]


def test_a_cell_fails_without_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--models", "MLP", "--model-width", "32", "--num-epochs", "1", "--seeds", "0", "--repeats", "0"]
    flags += ["--rules", "LLS", "BP", "--output", str(tmp_path)]
    path = tmp_path / "cells" / "digits_MLP_LLS_0.json"
    assert main([*flags, "--rules", "LLS", "--timeout", "0.01"]) == 1
    output = capsys.readouterr()
    assert "digits MLP LLS seed 0: failed: no answer within 0 s" in output.out
    assert "error: no cell has been trained, or all have failed" in output.err
    assert json.loads(path.read_text())["failed"] == "no answer within 0 s"
    assert main(flags) == 0  # the failed cell stays failed, the other is trained
    output = capsys.readouterr()
    assert "LLS seed 0" not in output.out
    assert "digits MLP BP seed 0: " in output.out
    assert "no answer within 0 s" in (tmp_path / "leaderboard.html").read_text()
    assert main([*flags, "--retry"]) == 0
    assert "training" in json.loads(path.read_text())
    name = "digits_MLP_LLS_measures"
    assert _cell(tmp_path, name)["measures"]["images_per_second"] is None
    assert main([*flags, *FAST]) == 0  # timed now: measured again, and nothing trained
    assert _cell(tmp_path, name)["measures"]["images_per_second"] > 0
    assert _cell(tmp_path, name)["timing"] == {"seed": 0, "speed_steps": 4, "repeats": 1, "processes": 2}


def test_what_fails_again_is_tried_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--models", "MLP", "--num-epochs", "1", "--seeds", "0", "--rules", "LLS", "--timeout", "0.01"]
    flags += ["--jobs", "2", "--train-only", "--output", str(tmp_path)]
    assert main(flags) == 0
    assert main(flags) == 0
    assert capfd.readouterr().out.count("seed 0: failed") == 1
    assert main([*flags, "--retry"]) == 0
    assert capfd.readouterr().out.count("seed 0: failed") == 1


def test_several_processes_share_the_cells(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rules = ["LLS", "LLS_M", "DRTP"]
    flags = ["--models", "MLP", "--model-width", "32", "--num-epochs", "1", "--seeds", "0", "1", "--repeats", "0"]
    (tmp_path / "cells").mkdir()
    taken = tmp_path / "cells" / "digits_MLP_DRTP_1.json"
    with claimed(taken):  # somebody else is at it
        assert main([*flags, "--rules", *rules, "--jobs", "2", "--train-only", "--output", str(tmp_path)]) == 0
    told = capfd.readouterr().out
    for rule in rules:
        for seed in (0, 1):
            expected = 0 if (rule, seed) == ("DRTP", 1) else 1
            assert told.count(f"digits MLP {rule} seed {seed}: ") == expected
    assert not taken.exists()
    assert not list((tmp_path / "cells").glob("*measures*"))


def test_a_budget_of_minutes(tmp_path: Path) -> None:
    """As many steps as the trial's speed says, whatever that is."""
    flags = ["--models", "MLP", "--model-width", "32", "--seeds", "0", "--rules", "LLS", "--train-only"]
    assert main([*flags, "--minutes", "0.02", "--speed-steps", "4", "--output", str(tmp_path)]) == 0
    cell = _cell(tmp_path, "digits_MLP_LLS_0")
    assert cell["settings"]["minutes"] == 0.02
    steps_per_epoch = 23
    assert len(cell["training"]["epochs"]) == -(-cell["training"]["steps"] // steps_per_epoch)


@pytest.mark.parametrize(("flags", "per_epoch"), [([], 2), (["--drop-last"], 1)])
def test_minutes_are_filled(flags: list[str], per_epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits have 1,437 images to train: a step more than one of a thousand, or none."""
    flags = [*flags, "--batch-size", "1000", "--minutes", "1", "--rules", "LLS", "--output", str(tmp_path)]
    options = parse(["--models", "MLP", "--seeds", "0", *flags])
    (key,) = options.keys
    with Session(options, print) as session:
        recipe = options.recipe_of(key, 0)
        session._data(recipe)
        monkeypatch.setattr(session, "_run", lambda *_: (SimpleNamespace(images_per_second=200.0), []))
        filled = session._within_minutes(recipe, key)
    assert (filled.max_steps, filled.num_epochs) == (12, 12 // per_epoch)


@pytest.mark.parametrize("flags", [["--lr", "x"], ["--rules", "LLX"], ["--datasets", "CIFAR10", "--dataset-dir", "no"]])
def test_a_mistake_is_one_line(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unlocked", "leaderboard", *flags, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
