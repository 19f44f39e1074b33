"""The files in the save path."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from unlocked.runtime.metrics.records import EpochResult, Meters, RunInfo, StepResult
from unlocked.runtime.metrics.run_log import CSV_COLUMNS, RunLog, format_step

INFO = RunInfo(
    model="SmallConv",
    dataset="digits",
    engine="sequential",
    rule="LLS",
    stages=(("conv1", "conv2"), ("output",)),
    total=100,
    epochs=3,
    steps_per_epoch=20,
    batch_size=64,
)
STEP = StepResult(
    epoch=2,
    step=9,
    steps=782,
    recent=Meters(time=0.0123, data=0.0004, loss=1.23451, acc1=50.0, acc5=100.0),
    mean=Meters(time=0.0131, data=0.0, loss=1.34561, acc1=48.0, acc5=99.5),
)


def epoch(number: int, loss: float = 0.1, evaluated: bool = True) -> EpochResult:
    return EpochResult(
        epoch=number,
        train_loss=loss,
        train_acc1=71.4567,
        train_acc5=97.0,
        eval_loss=0.2 if evaluated else None,
        eval_acc1=70.1234 if evaluated else None,
        eval_acc5=96.5 if evaluated else None,
        local_losses=(("conv1", 1.88), ("conv2", 0.1 + 0.2), ("output", 0.41)),
        seconds=1.5,
    )


def finished_run(path: Path, epochs: int = 2) -> None:
    log = RunLog(path, {"lr": 0.01})
    log.on_start(INFO)
    log.on_step(STEP)
    for number in range(epochs):
        log.on_epoch(epoch(number))
    log.on_finish({"test_acc1": 70.0})


def rows(path: Path) -> list[dict[str, str]]:
    with open(path / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_training_line_has_the_authors_form() -> None:
    assert format_step(STEP) == (
        "Epoch: [2] [  9/782]\tTime  0.012 ( 0.013)\tData  0.000 ( 0.000)\tLoss 1.2345e+00 (1.3456e+00)\t"
        "Acc@1  50.00 ( 48.00)\tAcc@5 100.00 ( 99.50)"
    )


def test_log_can_be_read_by_the_usual_expressions(tmp_path: Path) -> None:
    finished_run(tmp_path / "a" / "b")
    text = (tmp_path / "a" / "b" / "train.log").read_text()
    assert re.findall(r"@Training \* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", text) == [("71.457", "97.000")] * 2
    assert re.findall(r"@Testing \* Acc@1 ([\d.]+) Acc@5 ([\d.]+)", text) == [("70.123", "96.500")] * 2
    assert text.count("Losses - L1: 1.8800 - L2: 0.3000 - L3: 0.4100\n") == 2
    meters = re.search(r"Epoch: \[(\d+)\]\s*\[\s*(\d+)/(\d+)\]\s+Time\s+([\d.]+) \(\s*([\d.]+)\)", text)
    assert meters is not None
    assert meters.groups() == ("2", "9", "782", "0.012", "0.013")


def test_csv_holds_exact_values(tmp_path: Path) -> None:
    finished_run(tmp_path)
    table = rows(tmp_path)
    assert list(table[0]) == [*CSV_COLUMNS, "local_loss/conv1", "local_loss/conv2", "local_loss/output"]
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert float(table[1]["local_loss/conv2"]) == 0.1 + 0.2
    assert float(table[1]["train_acc1"]) == 71.4567


def test_epoch_without_evaluation_leaves_its_columns_empty(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.on_start(INFO)
    log.on_epoch(epoch(0, evaluated=False))
    assert rows(tmp_path)[0]["eval_acc1"] == ""
    assert "@Testing" not in (tmp_path / "train.log").read_text()


def test_config_holds_settings_and_versions_but_no_secrets(tmp_path: Path) -> None:
    RunLog(tmp_path, {"lr": 0.01, "hub_token": "abc123", "nested": {"API_KEY": "abc123", "path": Path("x")}}).on_start(
        INFO
    )
    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    assert config["settings"] == {"lr": 0.01, "nested": {"path": "x"}}
    assert config["run"]["stages"] == [["conv1", "conv2"], ["output"]]
    assert {"python", "torch"} <= config["versions"].keys()
    assert "abc123" not in text


def test_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds a run already .*--experiment-name.*--resume"):
        RunLog(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_constructing_writes_nothing(tmp_path: Path) -> None:
    RunLog(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunLog(tmp_path / "file")


def test_resume_appends_and_replaces_epochs_that_run_again(tmp_path: Path) -> None:
    finished_run(tmp_path, epochs=3)
    config = (tmp_path / "config.json").read_text()
    text = (tmp_path / "train.log").read_text()
    log = RunLog(tmp_path, {"lr": 0.02}, resume=True)
    log.on_start(INFO)
    log.on_epoch(epoch(1, loss=9.0))
    assert [(row["epoch"], row["train_loss"]) for row in rows(tmp_path)] == [("0", "0.1"), ("1", "9.0")]
    assert (tmp_path / "train.log").read_text().startswith(text)
    assert (tmp_path / "config.json").read_text() == config
    assert json.loads((tmp_path / "config.resume-1.json").read_text())["settings"] == {"lr": 0.02}


def test_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    finished_run(tmp_path)
    log = RunLog(tmp_path, resume=True)
    other = RunInfo(
        model="VGG8",
        dataset="digits",
        engine="sequential",
        rule="LLS",
        stages=(("conv1",),),
        total=1,
        epochs=1,
        steps_per_epoch=1,
        batch_size=1,
    )
    with pytest.raises(ValueError, match="resume with the same model"):
        log.on_start(other)


def test_layers_that_predict_have_columns_and_a_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.on_start(replace(INFO, scored=("conv2", "output")))
    log.on_epoch(replace(epoch(0), layer_acc1=(("conv2", 41.25), ("output", 70.1234))))
    (row,) = rows(tmp_path)
    assert (row["eval_acc1/conv2"], row["eval_acc1/output"]) == ("41.25", "70.1234")
    assert " @Layers Acc@1 conv2: 41.250 - output: 70.123\n" in (tmp_path / "train.log").read_text()


def test_an_earlier_releases_run_gets_the_columns_on_resume(tmp_path: Path) -> None:
    finished_run(tmp_path)
    log = RunLog(tmp_path, resume=True)
    log.on_start(replace(INFO, scored=("conv2", "output"), start=40))
    log.on_epoch(replace(epoch(2), layer_acc1=(("conv2", 41.25), ("output", 70.1234))))
    assert [row["eval_acc1/conv2"] for row in rows(tmp_path)] == ["", "", "41.25"]
