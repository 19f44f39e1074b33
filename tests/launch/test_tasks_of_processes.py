"""Law 1 for every task over processes: as it comes, with a worker that is killed, and resumed in the middle of an epoch
with another number of stages."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import language_runs
import pytest
import task_runs
from ranks import ranks

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("tasks_worker.py"))


Runs = Mapping[str, Any]
MODULES: dict[str, Any] = {"task_runs": task_runs, "language_runs": language_runs}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """By module, the plain loop's digests and last figures, and where its snapshots are."""

    @cache
    def of(module: str) -> Runs:
        folder, train = tmp_path_factory.mktemp(module), MODULES[module].train
        found: dict[str, Any] = {"folder": folder}
        for name in MODULES[module].CASES:
            _, whole = train(name, "sequential")
            train(name, "sequential", snapshot_dir=folder / name, snapshot_every=4, max_steps=9)
            last = whole.epochs[-1]
            figures = [last.eval_loss, last.eval_acc1, last.eval_figures, last.local_losses]
            found[name] = (whole.weights_sha256, json.loads(json.dumps(figures)))
        return found

    return of


@pytest.mark.parametrize(
    ("module", "size", "kinds"),
    [
        ("task_runs", 2, ["plain", "resumed"]),
        ("task_runs", 3, ["plain", "killed", "resumed"]),
        ("language_runs", 2, ["killed", "resumed"]),
    ],
)
def test_processes_equal_the_plain_loop(
    module: str, size: int, kinds: list[str], expected: Callable[[str], Runs], tmp_path: Path
) -> None:
    out, truth, cases = tmp_path / "out.jsonl", expected(module), MODULES[module].CASES
    with ranks(size, [WORKER, module, str(truth["folder"]), str(out), ",".join(kinds), *cases]) as started:
        texts = [process.communicate(timeout=280)[1] for process in started]
        assert [process.returncode for process in started] == [0] * size, texts
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["case"], line["kind"]) for line in lines] == [(case, kind) for case in cases for kind in kinds]
    for line in lines:
        assert (line["sha256"], line["figures"]) == truth[line["case"]], (line["case"], line["kind"])
        assert line["deaths"] == (line["kind"] == "killed")
