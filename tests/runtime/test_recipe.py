"""A run from names: what the command line says and what Python says are one recipe."""

import json
import pickle
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import dataset

from unlocked import Processes, Sequential, Streams
from unlocked.launch.command_line import parse
from unlocked.launch.pipeline import main
from unlocked.runtime.engines import ENGINES, engine_class
from unlocked.runtime.fields import flag_of
from unlocked.runtime.recipe import Recipe, make_rule, run

VALUES = {"stages": "2", "transport": "group", "green_contexts": "off"}  # of options that take no small number


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ("", Recipe()),
        ("--engine streams --stages 2 --graph-ticks 5 --no-graphs",
         Recipe(engine=Streams(stages=2, graph_ticks=5, graphs=False))),
        ("--engine processes --stages 0-1,2 --start-timeout 600 --no-pin --coordinator-port 5555 --transport group",
         Recipe(engine=Processes(stages="0-1,2", start_timeout=600.0, pin=False, coordinator_port=5555,
                                 transport="group"))),
        ("--model VGG8 --lr 0.1 -m 5 6 --seed 3 --device cuda --compile --no-eval --threads 2 --resume runs/x",
         Recipe(model="VGG8", lr=0.1, milestone=(5, 6), seed=3, device="cuda", compile=True, no_eval=True, threads=2,
                resume=Path("runs/x"))),
    ],
)  # fmt: skip
def test_flags_and_python_say_the_same(flags: str, recipe: Recipe) -> None:
    assert parse(flags.split(), default_engine="sequential") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert replace(recipe) == recipe


@pytest.mark.parametrize("owner", ENGINES)
@pytest.mark.parametrize("chosen", ENGINES)
def test_flags_of_another_engine_are_refused(owner: str, chosen: str, capsys: pytest.CaptureFixture[str]) -> None:
    for one in fields(engine_class(owner)):
        flag = flag_of(engine_class(owner), one.name)
        words = [flag] if one.type is bool else [flag, VALUES.get(one.name, "1")]
        if one.name in {other.name for other in fields(engine_class(chosen))}:
            made: Any = parse(["--engine", chosen, *words], default_engine="sequential").engine
            assert type(made) is engine_class(chosen)
            continue
        assert main(["--engine", chosen, *words]) == 2
        text = capsys.readouterr().err
        assert len(text.splitlines()) == 1
        assert f"engine {chosen} does not use {flag}" in text
        assert f"take --engine {owner}" in text or owner in text.split("used:")[1]


def test_many_foreign_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--engine sequential --transport shared --queue-depth 9 --graph-ticks 5 --no-pin --coordinator-port 5555"
    assert main(flags.split()) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    assert (
        "engine sequential does not use --transport, --queue-depth, --graph-ticks, --no-pin, --coordinator-port" in text
    )
    for words in ("--queue-depth by streams and processes", "--transport by processes", "leave them out"):
        assert words in text


def test_help_has_a_group_for_every_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], default_engine="sequential")
    text = capsys.readouterr().out
    for title, flag in (("engines streams and processes:", "--stages"), ("engine streams:", "--graph-ticks"),
                        ("engine processes:", "--start-timeout")):  # fmt: skip
        assert text.index(title) < text.index(f"  {flag}", text.index(title))


def test_the_config_has_the_engines_options_and_no_others() -> None:
    streams = Recipe(engine=Streams(graph_ticks=5), save_path=Path("runs")).config()
    assert (streams["engine"], streams["graph_ticks"], streams["save_path"]) == ("streams", 5, "runs")
    assert "transport" not in streams
    assert json.loads(json.dumps(streams)).keys() == streams.keys()
    assert "stages" not in Recipe(engine="sequential").config()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"lr": float("nan")}, "lr is nan; it must be positive"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
        ({"optimizer": "Adma"}, "valid: SGD, Adam, AdamW, AdamWSF, AdamWScheduleFree, SGDSF"),
        ({"training_mode": "LSS"}, "valid: LLS, LLS_M"),
        ({"lr_scheduler": "Step"}, "MultiStepLR"),
        ({"engine": "threads"}, "valid: sequential, streams, processes"),
        ({"print_freq": 0}, "print_freq is 0"),
    ],
)
def test_a_recipe_is_checked_at_once(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Recipe(**given)


def test_a_recipe_makes_a_trainer(tmp_path: Path) -> None:
    recipe = Recipe(engine=Streams(stages=2), seed=4, save_path=tmp_path, experiment_name="x", save_best_model=True)
    made = recipe.trainer(dataset(20), print_freq=7)
    assert made.settings.seed == 4
    assert made.settings.print_freq == 7
    assert made.engine == Streams(stages=2)
    assert made.settings.best_dir == tmp_path / "x" / "best"
    assert made.settings.snapshot_dir == tmp_path / "x" / "snapshots"
    assert made.names == {"model": "SmallConv", "dataset": "digits", "rule": "LLS"}
    assert make_rule(replace(recipe, training_mode="DFA")) == "DFA"


def test_a_recipe_runs_and_writes(tmp_path: Path) -> None:
    short = Recipe(max_steps=4, num_epochs=1, plain=True, statistics_batches=1, no_eval=True)
    plain = run(short)
    placed = run(replace(short, engine=Streams(stages=3), save_path=tmp_path, summary=tmp_path / "s.json"))
    assert placed.weights_sha256 == plain.weights_sha256
    assert json.loads((tmp_path / "s.json").read_text())["weights_sha256"] == plain.weights_sha256
    settings = json.loads((tmp_path / "SmallConv-digits-LLS-Adam" / "config.json").read_text())["settings"]
    assert (settings["engine"], settings["stages"], settings["max_steps"]) == ("streams", 3, 4)
    assert isinstance(replace(short, engine="sequential").engine, Sequential)
