"""MLflow, Weights & Biases and Trackio: what a run leaves in their files, without a network."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from unlocked.launch.pipeline import main
from unlocked.runtime.metrics.trackers import TRACKERS

# What is connected to is told by Python itself, whoever asks for it.
WATCHED = """
import sys
def watch(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], str | bytes):
        host = str(arguments[1][0])
        if host not in ("127.0.0.1", "::1", "localhost"):
            open("connected.txt", "a").write(f"{arguments[1]}\\n")
    if event == "socket.getaddrinfo" and str(arguments[0]) not in ("127.0.0.1", "::1", "localhost", "None"):
        open("connected.txt", "a").write(f"{arguments[0]}\\n")
sys.addaudithook(watch)
from unlocked.launch.pipeline import main
sys.exit(main(sys.argv[1:]))
"""


def train(folder: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-c", WATCHED, "--plain", "--no-save", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert not (folder / "connected.txt").exists(), (folder / "connected.txt").read_text()
    return done.returncode, done.stderr


def rows(file: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(file)) as database:
        return database.execute(query).fetchall()


@pytest.mark.alone
def test_each_writes_to_files_of_its_own(tmp_path: Path) -> None:
    for name in TRACKERS:
        pytest.importorskip(name)
    places = [word for name in TRACKERS for word in (f"--{name}", f"{name}-files")]
    flags = ["--num-epochs", "2", "--max-steps", "12", "--batch-size", "200", "--print-freq", "4", "--seed", "3"]
    code, told = train(tmp_path, *flags, *places, "--experiment-name", "Table1", "--summary", "s.json")
    assert code == 0, told
    assert not told, told
    epochs = json.loads((tmp_path / "s.json").read_text())["epoch_results"]
    accuracies = [epoch["test_acc1"] for epoch in epochs]

    mlflow = tmp_path / "mlflow-files" / "mlflow.db"
    found = rows(mlflow, "select value from metrics where key = 'acc_test' order by step")
    assert [value for (value,) in found] == accuracies
    assert rows(mlflow, "select max(value) from metrics where key = 'best_acc_test'") == [(max(accuracies),)]
    assert rows(mlflow, "select step from metrics where key = 'steps/loss'") == [(4,), (8,), (12,)]
    assert rows(mlflow, "select value from params where key in ('seed', 'learning_rate') order by key") == [
        ("0.01",),
        ("3",),
    ]
    assert rows(mlflow, "select name from experiments where name <> 'Default'") == [("Table1",)]
    assert rows(mlflow, "select status from runs") == [("FINISHED",)]

    (trackio,) = (tmp_path / "trackio-files").glob("*.db")
    logged = [json.loads(text) for (text,) in rows(trackio, "select metrics from metrics order by id")]
    assert [one["accuracy/test"] for one in logged if "accuracy/test" in one] == accuracies
    assert sum("steps/loss" in one for one in logged) == 3

    (wandb,) = (tmp_path / "wandb-files").rglob("run-*.wandb")
    content = wandb.read_bytes()
    for text in ("accuracy/test", "local_loss/conv1", repr(accuracies[-1]), "training_mode"):
        assert text.encode() in content, text

    code, _ = train(tmp_path, "--lr", "1e30", "--max-steps", "12", "--mlflow", "mlflow-files")
    assert code == 1
    assert rows(mlflow, "select status from runs order by start_time") == [("FINISHED",), ("FAILED",)]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_one_line_that_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["--plain", "--max-steps", "1", f"--{name}", str(tmp_path / "files")]) == 2
    shown = capsys.readouterr().err
    assert shown == f"error: --{name} needs the package {name}; pip install 'unlocked[{name}]'\n"
    assert not (tmp_path / "files").exists()


def test_an_extra_of_the_package_has_its_name() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    extras: Mapping[str, list[str]] = project["optional-dependencies"]
    for name in TRACKERS:
        assert any(requirement.startswith(name) for requirement in extras[name])
        assert set(extras[name]) <= set(extras["dev"])
