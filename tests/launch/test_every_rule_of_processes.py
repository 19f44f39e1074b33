"""Law 1 for rules of every kind over processes: side channel, views, read-out, updates without gradients.

With UNLOCKED_RULES=all, for every local rule there is.
"""

import json
import os
from pathlib import Path

import pytest
from ranks import ranks

from unlocked.rules import LOCAL_RULES, get_rule
from unlocked.runtime.conformance import train_small

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("rules_worker.py"))
SAMPLE = ("PredictiveSimilarity", "SoftHebb", "ForwardForward", "TaskAndConsistency", "BarlowTwins", "InfoPro")
NAMES = LOCAL_RULES if os.environ.get("UNLOCKED_RULES") == "all" else SAMPLE


@pytest.mark.parametrize("size", [2, 3])
def test_processes_equal_the_plain_loop(size: int, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ranks(size, [WORKER, str(out), *NAMES]) as started:
        texts = [process.communicate(timeout=280)[1] for process in started]
        assert [process.returncode for process in started] == [0] * size, texts
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["rule"] for line in lines] == list(NAMES)
    for line in lines:
        expected = train_small(get_rule(line["rule"], temperature=0.5, label_smoothing=0.0, waveform="cosine"))
        figures = [[e.eval_acc1, e.local_losses, e.layer_acc1] for e in expected.epochs]
        assert line["sha256"] == expected.weights_sha256, line["rule"]
        assert line["epochs"] == json.loads(json.dumps(figures)), line["rule"]
