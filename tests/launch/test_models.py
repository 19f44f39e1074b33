"""Law 1 for every model: two processes under torchrun, streams and the plain loop leave the same bits."""

import json
from pathlib import Path

import pytest
from models_worker import RULES, rules_for
from models_worker import main as train
from ranks import torchrun

from unlocked.models import MODELS

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("models_worker.py"))


def _read(path: Path) -> dict[tuple[str, str], dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["model"], line["rule"]): line for line in lines}


def test_two_processes_equal_the_plain_loop_for_every_model_and_rule(tmp_path: Path) -> None:
    out, truth = tmp_path / "processes.jsonl", tmp_path / "sequential.jsonl"
    with torchrun(2, [WORKER, "processes", str(out)]) as process:
        train("sequential", truth)  # meanwhile
        _, text = process.communicate(timeout=400)
        assert process.returncode == 0, text
    found, expected = _read(out), _read(truth)
    assert set(found) == set(expected) == {(model, rule) for model in MODELS for rule in rules_for(model)}
    assert len({line["sha256"] for line in expected.values()}) == len(expected)
    for key, line in expected.items():
        assert (line["stages"], found[key]["stages"]) == (1, 2)
        assert found[key]["sha256"] == line["sha256"], key
        assert found[key]["loss"] == line["loss"], key
    # The networks that the project began with have tests of their own in streams.
    others = sorted({model for model in MODELS if set(rules_for(model)) != set(RULES)})
    train("streams", tmp_path / "streams.jsonl", others)
    for key, line in _read(tmp_path / "streams.jsonl").items():
        assert line["stages"] > 2
        assert line["sha256"] == expected[key]["sha256"], key
