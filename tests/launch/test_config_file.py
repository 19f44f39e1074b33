"""`--config`: settings from a file, under the flags and above the defaults; what a run saves is such a file."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from unlocked.launch.command_line import TOPICS, make_parser, parse
from unlocked.launch.pipeline import main
from unlocked.runtime.engines import ENGINES, engine_class
from unlocked.runtime.fields import flag_of, setting_names, values_of
from unlocked.runtime.recipe import Recipe

FORMS = {
    "run.yaml": "lr: 1e-3  # as YAML's readers take it, a text\nnum-epochs: 3\nmilestone: [5, 7]\nplain: yes\n",
    "run.json": '{"lr": 0.001, "num_epochs": 3, "milestone": [5, 7], "plain": true}',
    "run.toml": "lr = 1e-3\nnum_epochs = 3\nmilestone = [5, 7]\nplain = true\n",
    "run": "{lr: 0.001, num_epochs: '3', milestone: [5, 7], plain: true}",
}


def read(*flags: str, default_engine: str = "sequential") -> Recipe:
    return parse(flags, default_engine=default_engine)


@pytest.mark.parametrize("name", FORMS)
def test_a_file_says_what_flags_say(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(FORMS[name])
    flags = ["--lr", "1e-3", "--num-epochs", "3", "--milestone", "5", "7", "--plain"]
    assert read("--config", str(file)) == read(*flags)
    assert read("--config", str(file), "--lr", "0.5", "-m", "9") == read(*flags, "--lr", "0.5", "--milestone", "9")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_config_of_a_run_is_one(engine: str, tmp_path: Path) -> None:
    """With every engine's options, and whatever the recipe holds."""
    options = ["--stages", "2", "--queue-depth", "3"] if engine != "sequential" else []
    flags = ["--engine", engine, *options, "--seed", "7", "--temperature", "0.7", "--save-path", str(tmp_path)]
    recipe = read(*flags, "--milestone", "3", "--tensorboard", str(tmp_path))
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"settings": recipe.config(), "run": {"stages": []}, "versions": {}}))
    assert read("--config", str(file)) == recipe
    assert read("--config", str(file), "-m", "9").milestone == (9,)
    other = read("--config", str(file), "--engine", "sequential")
    assert values_of(other) == values_of(recipe)
    assert other.engine == engine_class("sequential")()
    launched = read("--config", str(file), default_engine="processes").engine
    assert getattr(launched, "name", None) == "processes"  # torchrun has started them


def test_milestones_go_before_the_schedule_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"settings": read().config(), "run": {}, "versions": {}}))
    assert read("--config", str(file)).lr_scheduler == "none"
    assert read("--config", str(file), "-m", "5", "8") == read("-m", "5", "8")
    told = read("--config", str(file), "-m", "5", "--lr-scheduler", "ReduceLROnPlateau")
    assert told.lr_scheduler == "ReduceLROnPlateau"


def test_a_run_and_its_config_come_to_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--plain", "--max-steps", "5", "--no-eval", "--optimizer", "SGD", "--seed", "3"]
    where = ["--save-path", str(tmp_path), "--experiment-name", "one", "--summary", str(tmp_path / "s.json")]
    assert main([*flags, *where]) == 0
    first = json.loads((tmp_path / "s.json").read_text())["weights_sha256"]
    assert main(["--config", str(tmp_path / "one" / "config.json")]) == 0
    assert f"saved in {tmp_path / 'one-2'}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["weights_sha256"] == first


def test_the_printed_config_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--engine", "streams", "--stages", "0-1,2-4", "--no-graphs", "--lr", "0.2", "--dataset-dir", "~"]
    with pytest.raises(SystemExit, match="0"):
        main([*flags, "--print-config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read("--config", str(tmp_path / "printed.yaml")) == read(*flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: 0.1", ["'learning_rate' is no setting", "did you mean lr?"]),
        ("temprature: 0.1", ["'temprature'", "did you mean temperature?"]),
        ("frobnicate: 1", ["'frobnicate' is no setting; see --help"]),
        ("lr: fast", ["lr is 'fast'", "a number"]),
        ("lr: .nan", ["lr is nan", "positive"]),
        ("num_epochs: 2.5", ["num_epochs is 2.5", "a whole number"]),
        ("num_epochs: true", ["num_epochs is True", "a whole number"]),
        ("plain: 1", ["plain is 1", "True or False"]),
        ("experiment_name: 7", ["experiment_name is 7", "a string"]),
        ("milestone: 7", ["milestone is 7", "a tuple"]),
        ("training_mode: LSS", ["training_mode 'LSS' is not known", "LLS_MxM"]),
        ("engine: threads", ["'threads'", "sequential, streams, processes"]),
        ("engine: 3", ["engine is 3", "sequential, streams, processes"]),
        ("engine: sequential\nstages: 2", ["sequential does not use --stages"]),
        ("lr: 1\nlr: 2", ["'lr' is there twice"]),
        ("num-epochs: 1\nnum_epochs: 2", ["'num_epochs' is there twice"]),
        ("- lr\n- 0.1", ["holds a list", "'lr: 0.01'"]),
        ("lr: [", ["can't be read as YAML"]),
        ("!!python/object/apply:os.getcwd []", ["can't be read as YAML"]),
        ("save_path: /etc/passwd", ["save_path /etc/passwd is a file"]),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    text: str, words: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["--config", str(file)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    for word in words:
        assert word in shown, shown
    if "engine" not in text:
        assert f"config {file}" in shown


@pytest.mark.parametrize("name", ["missing.yaml", ".", "binary.yaml"])
def test_a_file_that_is_none_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["--config", str(tmp_path / name)]) == 2
    shown = capsys.readouterr().err
    assert "can't be read (" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning-rate", "0.1"], "there is no flag --learning-rate; did you mean --lr?"),
        (["--epoch=3"], "there is no flag --epoch; did you mean --num-epochs?"),
        (["--temprature", "1"], "there is no flag --temprature; did you mean --temperature?"),
        (["--zzz"], "there is no flag --zzz; see --help"),
        (["digits"], "nothing takes the argument 'digits'"),
    ],
)
def test_an_unknown_flag_names_the_nearest(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert words in capsys.readouterr().err


def test_every_setting_has_its_place_in_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [name for names in TOPICS.values() for name in names]
    by_other_means = {one for one in setting_names(Recipe) if not _has_flag(one)}
    assert sorted(told) == sorted(setting_names(Recipe) - by_other_means)
    assert by_other_means == {"snapshot_dir", "best_dir", "run_number"}
    for columns in (80, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = make_parser().format_help().splitlines()
        assert max(map(len, lines)) <= columns
        assert len(lines) < 4 * 80
    monkeypatch.setenv("COLUMNS", "80")
    text = " ".join(make_parser().format_help().split())
    recipe = Recipe()
    for one in fields(Recipe):
        value = getattr(recipe, one.name)
        if one.name in told and isinstance(value, int | float | str) and not isinstance(value, bool) and value != "":
            assert f"(default: {value})" in text or one.name == "lr_scheduler", one.name
    assert "default: True" not in text
    assert "default: None" not in text


def _has_flag(name: str) -> bool:
    return flag_of(Recipe, name) in make_parser()._option_string_actions
