"""The lines of the authors' tables as they are: in one folder, by their names, with their defaults where asked for.

Sources: the tables of the LLS paper (WACV 2025) and the flags of the release's main.py.
"""

import json
from itertools import product
from pathlib import Path

import pytest

from unlocked.launch.command_line import AUTHORS_DEFAULTS, parse
from unlocked.launch.pipeline import main
from unlocked.runtime.recipe import Recipe

RULES_1 = ("LLS --waveform cosine", "LLS --waveform square", "LLS_Random")
RULES_3 = (
    *("BP", "LocalLosses"),
    *(f"{rule} --waveform square" for rule in ("LLS", "LLS_M", "LLS_MxM")),
)
SMALL = ("MNIST", "FashionMNIST", "CIFAR10", "IMAGENETTE_BASIC")
LARGE = ("MNIST", "FashionMNIST", "CIFAR10AUG", "IMAGENETTE")
DEEP = ("CIFAR10AUG", "CIFAR100AUG", "IMAGENETTE", "TinyIMAGENET", "VWW")
LINES = {
    1: [
        *((data, "LLS_SmallConv", 100, rule) for data, rule in product(SMALL, RULES_1)),
        *((data, "LLS_VGG8", 100 if "MNIST" in data else 300, rule) for data, rule in product(LARGE, RULES_1)),
    ],
    2: [
        *((data, "LLS_SmallConvL", 100, "LLS --waveform square") for data in ("MNIST", "CIFAR10", "CIFAR100")),
        *((data, "LLS_SmallConvL", 100, "BP") for data in ("MNIST", "CIFAR10", "CIFAR100")),
        *((data, "DFA_SmallConvL", 100, "DFA") for data in ("CIFAR10", "CIFAR100")),
        ("MNIST", "DFA_SmallConvLMNIST", 100, "DFA"),
    ],
    3: [(data, "LLS_VGG8", 300, rule) for data, rule in product(DEEP, RULES_3)],
}
"""Table -> (data, model, epochs, rule and waveform) of its lines."""


def line(table: int, data: str, model: str, epochs: int, rule: str) -> list[str]:
    told = f"--dataset {data} --model {model} --num-epochs {epochs} --lr 5e-3 --training-mode {rule} --batch-size 128"
    return f"{told} --test-batch-size 128 --optimizer AdamWSF --experiment-name Table{table}".split()


def test_every_line_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNLOCKED_SAVE_PATH")
    for table, lines in LINES.items():
        for data, model, epochs, rule in lines:
            recipe = parse(line(table, data, model, epochs, rule), default_engine="sequential")
            assert (recipe.dataset, recipe.model, recipe.num_epochs) == (data, model, epochs)
            assert (recipe.training_mode, recipe.waveform) == (rule.split()[0], [*rule.split(), "", "cosine"][2])
            assert (recipe.lr, recipe.optimizer, recipe.batch_size) == (0.005, "AdamWSF", 128)
            assert recipe.folder == Path("experiments") / f"Table{table}"


def test_each_form_trains_and_the_runs_of_a_table_lie_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair of model and rule once: one small micro-batch of digits, everything else as they have it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNLOCKED_SAVE_PATH")
    tiny = ["--dataset", "digits", "--max-steps", "1", "--batch-size", "16", "--no-eval", "--plain"]
    for table, lines in LINES.items():
        forms = {(model, rule): (data, model, epochs, rule) for data, model, epochs, rule in lines}
        for number, form in enumerate(forms.values(), start=1):
            assert main([*line(table, *form), *tiny]) == 0
            folder = Path("experiments") / (f"Table{table}" if number == 1 else f"Table{table}-{number}")
            assert f"saved in {folder}\n" in capsys.readouterr().out
            assert {"train.log", "config.json", "metrics.csv", "model_final.pt"} <= {p.name for p in folder.iterdir()}
            settings = json.loads((folder / "config.json").read_text())["settings"]
            assert (settings["model"], settings["training_mode"]) == (form[1], form[3].split()[0])
            assert (settings["experiment_name"], settings["run_number"]) == (f"Table{table}", number)
    assert not list(tmp_path.rglob(".run*"))  # neither claims nor locks are left


def test_their_defaults_where_ours_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    monkeypatch.delenv("UNLOCKED_SAVE_PATH")
    monkeypatch.chdir(tmp_path)
    theirs = parse(["--authors-defaults"], default_engine="sequential")
    ours = Recipe()
    assert theirs.save_path == Path("experiments")
    told = {
        "dataset": "CIFAR10",
        "model": "LLS_SmallConv",
        "num_epochs": 1,
        "lr": 0.1,
        "training_mode": "LLS",
        "waveform": "cosine",
        "batch_size": 64,
        "test_batch_size": 128,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "pool": "MAX",
        "optimizer": "SGD",
        "milestone": (50, 80, 120, 180),
        "gamma": 0.3,
        "print_freq": 300,
        "experiment_name": "LLS",
        "lr_scheduler": "ReduceLROnPlateau",
        "patience": 1000,
        "temperature": 0.5,
        "label_smoothing": 0.0,
        "dropout": 0.0,
        "classes_per_batch": None,
        "save_best_model": False,
        "dataset_dir": Path("/somebody/Datasets"),
    }
    assert {name: getattr(theirs, name) for name in told} == told
    assert AUTHORS_DEFAULTS.keys() == {name for name in told if getattr(ours, name) != told[name]}
    (tmp_path / "run.yaml").write_text("lr: 0.3\npatience: 7\n")
    mixed = parse(["--patience", "5", "--authors-defaults", "--config", "run.yaml"], default_engine="sequential")
    assert (mixed.lr, mixed.patience, mixed.optimizer) == (0.3, 5, "SGD")


def test_without_a_place_to_save_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNLOCKED_SAVE_PATH")
    (tmp_path / "experiments").write_text("a file")
    with pytest.warns(
        UserWarning, match=r"nothing of the run is saved: save_path experiments is a file; .*--save-path"
    ):
        assert main(["--plain", "--max-steps", "1", "--no-eval"]) == 0
    assert "saved in" not in capsys.readouterr().out
    assert main(["--plain", "--max-steps", "1", "--no-eval", "--no-save", "--save-path", "runs"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    (tmp_path / "experiments").unlink()
    assert main(["--plain", "--max-steps", "1", "--no-eval", "--no-save"]) == 0
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second of its name, also where neither path nor name is given, and among runs of other rules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNLOCKED_SAVE_PATH")
    flags = ["--plain", "--no-eval", "--snapshot-every", "5", "--batch-size", "200"]
    auto = ["--experiment-name", "table", "--resume", "auto"]
    for rule in ("LLS", "LLS_M"):
        assert main([*flags, *auto, "--training-mode", rule, "--num-epochs", "1"]) == 0
    for rule in ("LLS", "LLS_M"):
        assert main([*flags, *auto, "--training-mode", rule, "--num-epochs", "2"]) == 0
    second = ["--training-mode", "LLS_M", "--num-epochs", "3", "--resume", "experiments/table-2/snapshots"]
    assert main([*flags, *second]) == 0
    assert sorted(path.name for path in Path("experiments").iterdir()) == ["table", "table-2"]
    for folder, epochs in (("table", 2), ("table-2", 3)):
        assert len(Path("experiments", folder, "metrics.csv").read_text().splitlines()) == 1 + epochs
