"""TensorBoard's own reader finds the run's figures in the event files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlocked.launch.pipeline import main

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
ROOT = Path(__file__).resolve().parents[3]


def test_event_files_hold_what_the_summary_says(tmp_path: Path) -> None:
    flags = ["--num-epochs", "2", "--max-steps", "30", "--print-freq", "5", "--plain"]
    flags += ["--summary", str(tmp_path / "summary.json"), "--tensorboard", str(tmp_path / "board")]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    events = accumulator.EventAccumulator(str(tmp_path / "board" / "SmallConv-digits-LLS-Adam"))
    events.Reload()

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)]

    epochs = summary["epoch_results"]
    assert values("accuracy/test") == pytest.approx([epoch["test_acc1"] for epoch in epochs], rel=1e-6)
    assert values("loss/train") == pytest.approx([epoch["train_loss"] for epoch in epochs], rel=1e-6)
    assert [event.step for event in events.Scalars("accuracy/test")] == [1, 2]
    for layer, loss in summary["local_losses"].items():
        assert values(f"local_loss/{layer}")[-1] == pytest.approx(loss, rel=1e-6)
    assert [event.step for event in events.Scalars("steps/loss")] == [5, 10, 15, 20, 23, 28, 30]


def test_without_the_package_the_error_is_one_line(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['tensorboard'] = None; from unlocked.launch.pipeline import main; "
        f"sys.exit(main(['--tensorboard', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --tensorboard needs the package tensorboard; pip install 'unlocked[tensorboard]'"
    ]
