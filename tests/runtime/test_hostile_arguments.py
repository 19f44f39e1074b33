"""Every setting of every dataclass, and every argument of `Trainer` and `fit`, with values that nobody should give: it
runs, or a ValueError of one line says what is wrong. What has settings is found by looking, so what is added is tried.
"""

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import dataset, fit, trainer
from source_tree import Source

from unlocked.comparison.memory.results import ChainSettings
from unlocked.comparison.meter import Meter
from unlocked.models import small_conv
from unlocked.rules import LLS, RULES
from unlocked.runtime import Trainer
from unlocked.runtime.engines.processes.rendezvous import World
from unlocked.runtime.fields import check, from_environment
from unlocked.runtime.job import Job
from unlocked.runtime.learning_rate import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.settings import Settings

VALUES: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, 0, -1, 2.5, 10**30, 10**400, True, None, "", "abc", "1e400", "~nosuchuser", b"x"),
    *([], (), {}, [None], object(), int, np.float64("nan"), np.int64(-1), np.zeros(3), torch.tensor(1.0)),
    *(Path("folder"), Path("file"), Path("file/below"), "a\0b", "x" * 300),
)
_RECIPE = Recipe()
_TRAINER: dict[str, Any] = {
    "model": small_conv(3, 5, 16),
    "rule": LLS(),
    "optimizer": partial(torch.optim.SGD, lr=0.1),
}
# What a dataclass needs beside the setting that is tried.
NEEDED: dict[str, dict[str, Any]] = {
    "MemoryOptions": {"chain": ChainSettings()},
    "StagesOptions": {"chain": ChainSettings()},
    "StreamPlan": {"epochs": 1, "train_size": 8, "batch_size": 4},
    "CompareOptions": {
        **dict.fromkeys(("queue_depth", "trial_steps", "epochs", "speed_steps", "repeats", "seeds"), 1),
        "recipe": _RECIPE,
        "command": "",
    },
    "LeaderboardOptions": {"recipe": _RECIPE, "command": ""},
    "Trainer": _TRAINER,
    "_Jobs": _TRAINER,
    "MeasuredTrainer": {**_TRAINER, "meter": Meter(torch.device("cpu"))},
}


def _owners() -> list[type]:
    """Every dataclass with settings, but those whose values come from the environment."""
    found = {}
    for name in Source(Path(__file__).parents[2]).files:
        if not name.startswith("unlocked.kernels"):
            for owner in vars(importlib.import_module(name)).values():
                if isinstance(owner, type) and is_dataclass(owner) and _settings(owner):
                    found[owner.__qualname__] = owner
    assert found.keys() >= {"Recipe", "Settings", "Trainer", "Streams", "StreamPlan", "CompareOptions", "World"}
    return [found[name] for name in sorted(found) if name != World.__name__]


def _settings(owner: type) -> list[Any]:
    return [one for one in fields(owner) if "setting" in one.metadata]


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("something else")


def _problem(call: Callable[[], object]) -> str | None:
    """What is wrong with how the call ended; None: it ran, or said its mistake in one line."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        return None if text and len(text.splitlines()) == 1 else f"a ValueError that says {text!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_every_number_has_two_bounds() -> None:
    unbounded = []
    for owner in [*_owners(), World]:
        for one in _settings(owner):
            spec = one.metadata["setting"]
            if any(kind in str(one.type) for kind in ("int", "float")):
                low, high = (spec.at_least, spec.above), (spec.at_most, spec.below)
                if (low, high).count((None, None)) or not all(map(math.isfinite, filter(None, (*low, *high)))):
                    unbounded.append(f"{owner.__name__}.{one.name}")
            if str(one.type).find("Path") >= 0 and not spec.place:
                unbounded.append(f"{owner.__name__}.{one.name} says no place")
    assert not unbounded


def test_a_setting_is_taken_or_refused_in_one_line() -> None:
    problems = []
    for owner in _owners():
        needed = NEEDED.get(owner.__name__, {})
        for one in _settings(owner):
            for value in VALUES:
                if problem := _problem(lambda: owner(**{**needed, one.name: value})):  # noqa: B023 (called at once)
                    problems.append(f"{owner.__name__}({one.name}={value!r:.30}): {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_a_setting_that_is_taken_trains(engine: str) -> None:
    made = type(trainer(engine).engine)
    names = [one.name for one in (*_settings(Settings), *_settings(made)) if one.name not in ("compile", "device")]
    problems = []
    for name in names:
        for value in VALUES:
            if problem := _problem(lambda: fit(trainer(engine, **{name: value}), epochs=1, max_steps=1)):  # noqa: B023
                problems.append(f"{name}={value!r:.30}: {problem}")
    assert not problems, "\n".join(problems)


def test_what_the_trainer_is_given_trains_or_is_refused_in_one_line() -> None:
    names = [one.name for one in fields(Trainer) if one.init and "setting" not in one.metadata]
    assert {"model", "rule", "optimizer", "engine", "redraw", "lr_factor", "sinks", "names"} <= set(names)
    needed = NEEDED["Trainer"]
    problems = []
    for name in names:
        for value in VALUES:
            if problem := _problem(lambda: fit(Trainer(**{**needed, name: value}), max_steps=1)):  # noqa: B023
                problems.append(f"{name}={value!r:.30}: {problem}")
    assert not problems, "\n".join(problems)


def test_what_fit_is_given_trains_or_is_refused_in_one_line() -> None:
    given: dict[str, Any] = {"train": dataset(20), "epochs": 1, "batch_size": 10, "max_steps": 1}
    given |= {"eval_data": dataset(10, "test"), "eval_batch_size": 10}
    one = trainer()
    problems = []
    for name in inspect.signature(Trainer.fit).parameters.keys() - {"self"}:
        for value in VALUES:
            if problem := _problem(lambda: one.fit(**{**given, name: value})):  # noqa: B023
                problems.append(f"{name}={value!r:.30}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("owner", [*RULES.values(), MultiStepLR, CosineAnnealingLR, ReduceLROnPlateau])
def test_a_rule_or_a_schedule_is_made_or_refused_in_one_line(owner: Any) -> None:
    needed = {"milestones": (1,), "gamma": 0.5} if owner is MultiStepLR else {}
    needed |= {"epochs": 3} if owner is CosineAnnealingLR else {}
    problems = []
    for one in fields(owner):
        for value in VALUES:
            if problem := _problem(lambda: owner(**{**needed, one.name: value})):  # noqa: B023
                problems.append(f"{owner.__name__}({one.name}={value!r:.30}): {problem}")
    assert not problems, "\n".join(problems)


WORLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_is_held_to_the_same_bounds() -> None:
    assert from_environment(World, {**WORLD, "LOCAL_RANK": " 1 ", "LOCAL_WORLD_SIZE": "2"}) == World(
        rank=1, size=2, local_rank=1, local_size=2, master_address="127.0.0.1", master_port=29500
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RANK", "abc", "RANK is 'abc'; it must be a whole number"),
        ("RANK", "", "RANK is empty; it must be a whole number"),
        ("RANK", "-1", "RANK is -1; it must be at least 0"),
        ("RANK", "2", "RANK is 2, but WORLD_SIZE is 2"),
        ("WORLD_SIZE", "nan", "WORLD_SIZE is 'nan'; it must be a whole number"),
        ("WORLD_SIZE", "1" + 30 * "0", "it must be at least 1 and at most"),
        ("MASTER_PORT", "99999", "MASTER_PORT is 99999; it must be at least 1 and at most 65535"),
        ("MASTER_PORT", "0", "MASTER_PORT is 0; it must be at least 1"),
        ("MASTER_ADDR", " ", "MASTER_ADDR is empty; it must be a string"),
        ("LOCAL_RANK", "1.5", "LOCAL_RANK is '1.5'; it must be a whole number"),
        ("LOCAL_RANK", "2", "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE is 0; it must be at least 1"),
    ],
)
def test_a_launchers_mistake_names_the_variable(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {**WORLD, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", variable: value}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=words.replace("[", r"\[")) as error:
        World.from_environment()
    assert len(str(error.value).splitlines()) == 1


def test_numpys_numbers_become_pythons() -> None:
    made = Settings(seed=np.int64(3), timeout=np.float32(2.5))  # type: ignore[arg-type]
    assert (type(made.seed), type(made.timeout)) == (int, float)
    check(made)


def test_many_epochs_ask_for_few_rates() -> None:
    asked = []

    def rate(epoch: int) -> float:
        asked.append(epoch)
        return 1.0

    short, long = (fit(trainer(lr_factor=rate), epochs=epochs, max_steps=1) for epochs in (2, 2 * 10**9))
    assert short.weights_sha256 == long.weights_sha256
    assert len(asked) < 3000
    plateau = fit(trainer(lr_factor=ReduceLROnPlateau()), epochs=2 * 10**9, max_steps=1)
    assert plateau.weights_sha256 == short.weights_sha256


@pytest.mark.parametrize("rule", [LLS(), "BP"])
def test_a_frozen_network_is_refused_by_name(rule: Any) -> None:
    blocks = small_conv(3, 5, 16)
    for block in blocks:
        block.requires_grad_(False)
    with pytest.raises(ValueError, match="no layer has anything to train: conv1, conv2, conv3, linear1, output"):
        fit(Trainer(blocks, rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1)))
    blocks[0].requires_grad_(True)
    assert fit(Trainer(blocks, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1)), max_steps=1).steps == 1


class ByClosure(torch.optim.SGD):
    def step(self, closure: Any) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, ByClosure])
@pytest.mark.parametrize("of_layers", [False, True])
def test_an_optimizer_that_steps_by_a_closure_is_refused_before_the_first_step(
    kind: Any, of_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Job, "stage", lambda *_, **__: pytest.fail("a stage was built"))
    blocks = small_conv(3, 5, 16)
    adam, last = partial(torch.optim.Adam, lr=0.1), partial(kind, lr=0.1)
    optimizer = {block.name: adam for block in blocks} | {"output": last} if of_layers else last
    with pytest.raises(ValueError, match=f"optimizer {kind.__name__} can't step without closure; ") as error:
        fit(Trainer(blocks, rule=LLS(), optimizer=optimizer))
    assert len(str(error.value).splitlines()) == 1
