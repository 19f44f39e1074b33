"""Law 1 for blocks that write into their inputs: a worker in a dead one's place reads the slots as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import writing_blocks
from ranks import ranks

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("tasks_worker.py"))


def test_a_replaced_worker_reads_what_was_sent(tmp_path: Path) -> None:
    out, kinds = tmp_path / "out.jsonl", ["plain", "killed", "evaluating"]
    arguments = ["writing_blocks", str(tmp_path), str(out), ",".join(kinds), *writing_blocks.CASES]
    with ranks(3, [WORKER, *arguments]) as started:
        texts = [process.communicate(timeout=400)[1] for process in started]
        assert [process.returncode for process in started] == [0] * 3, texts
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    cases = list(writing_blocks.CASES)
    assert [(line["case"], line["kind"]) for line in lines] == [(case, kind) for case in cases for kind in kinds]
    truth, wrong = dict(map(expected, cases)), []
    for line in lines:
        case, kind = line["case"], line["kind"]
        if (line["sha256"], line["figures"]) != truth[case]:
            wrong.append((case, kind))
        assert line["deaths"] == (kind != "plain"), (case, kind)
    assert not wrong


def expected(case: str) -> tuple[str, tuple[str, Any]]:
    """The case, and the plain loop's digest and last figures."""
    _, whole = writing_blocks.train(case, "sequential")
    last = whole.epochs[-1]
    figures = [last.eval_loss, last.eval_acc1, last.eval_figures, last.local_losses]
    return case, (whole.weights_sha256, json.loads(json.dumps(figures)))
