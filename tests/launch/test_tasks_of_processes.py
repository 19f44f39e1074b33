"""Law 1 for every task over processes: as it comes, with a worker that is killed, and resumed in the middle of an epoch
with another number of stages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ranks import ranks
from task_runs import CASES, train

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("tasks_worker.py"))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The plain loop's digest and last figures, and where its snapshots are."""
    folder = tmp_path_factory.mktemp("snapshots")
    found: dict[str, Any] = {"folder": folder}
    for name in CASES:
        _, whole = train(name, "sequential")
        train(name, "sequential", snapshot_dir=folder / name, snapshot_every=4, max_steps=9)
        last = whole.epochs[-1]
        figures = [last.eval_loss, last.eval_acc1, last.eval_figures, last.local_losses]
        found[name] = (whole.weights_sha256, json.loads(json.dumps(figures)))
    return found


@pytest.mark.parametrize(("size", "kinds"), [(2, ["plain", "resumed"]), (3, ["plain", "killed", "resumed"])])
def test_processes_equal_the_plain_loop(
    size: int, kinds: list[str], expected: Mapping[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with ranks(size, [WORKER, str(expected["folder"]), str(out), ",".join(kinds), *CASES]) as started:
        texts = [process.communicate(timeout=280)[1] for process in started]
        assert [process.returncode for process in started] == [0] * size, texts
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["case"], line["kind"]) for line in lines] == [(case, kind) for case in CASES for kind in kinds]
    for line in lines:
        assert (line["sha256"], line["figures"]) == expected[line["case"]], (line["case"], line["kind"])
        assert line["deaths"] == (line["kind"] == "killed")
