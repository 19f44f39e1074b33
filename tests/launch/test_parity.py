"""The authors' command lines, with pipeline.py in the place of main.py."""

import json
from pathlib import Path

import pytest

from unlocked.launch.command_line import parse
from unlocked.launch.pipeline import main

COMMANDS = [  # one of every form that their tables have; data and length are this test's
    "--dataset CIFAR10 --num-epochs 25 --training-mode BP --lr 0.01 --test-batch-size 128 --optimizer Adam",
    "--dataset MNIST --model LLS_SmallConv --num-epochs 100 --lr 5e-3 --training-mode LLS  --batch-size 128 "
    "--test-batch-size 128 --optimizer AdamWSF --waveform cosine --experiment-name Table1",
    "--dataset CIFAR10AUG --model LLS_VGG8 --num-epochs 300 --lr 5e-3 --training-mode LLS_MxM --batch-size 128 "
    "--test-batch-size 128 --optimizer AdamWSF --waveform square --experiment-name Table2",
    "--dataset CIFAR100 --model DFA_SmallConvL --num-epochs 100 --lr 5e-3 --training-mode DFA --batch-size 128 "
    "--test-batch-size 128 --optimizer AdamWSF --experiment-name Table2",
    "--dataset MNIST --model DFA_SmallConvLMNIST --num-epochs 100 --lr 5e-3 --training-mode DFA --batch-size 128 "
    "--test-batch-size 128 --optimizer AdamWSF --experiment-name Table2",
    "--model LLS_SmallConv --training-mode LocalLosses --lr 0.1 --optimizer SGD --momentum 0.8 --weight-decay 1e-4 "
    "--lr-scheduler MultiStepLR -m 50 80 --gamma 0.2 --temperature 0.7 --label-smoothing 0.1 --dropout 0.2 --pool MAX",
    "--training-mode DRTP --optimizer SGDSF --lr-scheduler ReduceLROnPlateau --patience 1000 --gamma 0.3 "
    "--print-freq 300 --record-gpu-mem",
    "--training-mode LLS_M_Random --optimizer AdamW --milestone 1 --save-best-model",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_authors_commands_train(command: str, tmp_path: Path) -> None:
    """Two micro-batches of digits each, with everything else as they have it."""
    flags = [*command.split(), "--dataset", "digits", "--max-steps", "2", "--plain", "--batch-size", "32"]
    flags += ["--save-path", str(tmp_path), "--summary", str(tmp_path / "summary.json"), "--statistics-batches", "1"]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    options = parse(flags, default_engine="sequential")
    assert (summary["steps"], summary["training_mode"]) == (2, options.training_mode)
    assert summary["test_loss"] is not None
    settings = json.loads((tmp_path / options.run_name / "config.json").read_text())["settings"]
    assert settings["lr_scheduler"] == options.lr_scheduler


@pytest.mark.parametrize(
    ("flags", "scheduler", "milestones"),
    [
        ("", "none", (50, 80, 120, 180)),
        ("--lr-scheduler MultiStepLR", "MultiStepLR", (50, 80, 120, 180)),
        ("--milestone 10 20", "MultiStepLR", (10, 20)),
        ("-m 7 --lr-scheduler ReduceLROnPlateau", "ReduceLROnPlateau", (7,)),
    ],
)
def test_milestones(flags: str, scheduler: str, milestones: tuple[int, ...]) -> None:
    options = parse(flags.split(), default_engine="sequential")
    assert (options.lr_scheduler, options.milestone) == (scheduler, milestones)


def test_the_home_folder_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    options = parse(["--dataset-dir", "~/Datasets", "--save-path", "~/runs"], default_engine="sequential")
    assert options.dataset_dir == Path("/somebody/Datasets")
    assert options.save_path == Path("/somebody/runs")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--training-mode lls", ["'lls'", "LLS_MxM_reduced", "DRTP", "BP, DFA"]),
        ("--optimizer AdamWSF3", ["'AdamWSF3'", "SGD, Adam, AdamW, AdamWSF, AdamWScheduleFree, SGDSF"]),
        ("--model lls_smallconv", ["'lls_smallconv'", "SmallConv", "LLS_"]),
        ("--model DFA_ResNet", ["'ResNet'", "SmallConvL"]),
        ("--pool MIN", ["pool 'MIN'", "MAX, AVG"]),
        ("--pool AVG --model MobileNetV1", ["no max pools", "leave --pool AVG out"]),
        ("--classes-per-batch 11", ["classes_per_batch is 11", "1 to 10"]),
        ("--milestone ten", ["--milestone", "'ten'"]),
        ("--lr-scheduler StepLR", ["'StepLR'", "none, MultiStepLR, CosineAnnealingLR, ReduceLROnPlateau"]),
        ("--lr-scheduler ReduceLROnPlateau --gamma 1", ["factor of ReduceLROnPlateau is 1.0"]),
        ("--lr-scheduler ReduceLROnPlateau --patience -1", ["patience is -1"]),
        ("--lr-scheduler ReduceLROnPlateau --no-eval", ["ReduceLROnPlateau needs the test loss"]),
        ("--training-mode DFA --engine processes", ["DFA is not local", "engine sequential"]),
        ("--optimizer SGDSF --momentum 0", ["omentum"]),
        ("--model VGG8 --training-mode LLS_MxM_reduced --batch-size 0", ["batch_size is 0"]),
    ],
)
def test_other_values_are_one_line(flags: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plain", "--num-epochs", "1", *flags.split()]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text, text
