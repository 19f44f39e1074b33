"""A notebook, executed without a browser: it trains with two processes, and what a cell shows is short."""

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.alone

CELLS = [
    """
    from functools import partial
    import torch
    from torch import nn
    import unlocked
    from unlocked import LLS, Processes, Trainer, load_dataset

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 32)

        def forward(self, x):
            return torch.relu(2 * self.linear(x.flatten(1)))

    def network():
        torch.manual_seed(0)
        return nn.Sequential(Doubled(), nn.Linear(32, 32), nn.Linear(32, 10))

    train, test = load_dataset("digits")

    def trainer(engine):
        return Trainer(network(), rule=lambda info: LLS(temperature=0.5)(info), engine=engine, threads=1,
                       optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2))

    one = trainer(Processes(stages=2))
    result = one.fit(train, epochs=2, batch_size=64, eval_data=test)
    result
    """,
    """
    alone = trainer("sequential").fit(train, epochs=2, batch_size=64, eval_data=test)
    assert alone.weights_sha256 == result.weights_sha256
    scores = one.predict(test.images)
    report = one.evaluate(test)
    assert report.acc1 == result.test_acc1 == 100 * (scores.argmax(1) == test.labels).double().mean()
    report
    """,
    """
    result.save("kept.safetensors")
    again = unlocked.load("kept.safetensors", network())
    one.export("kept.pt2")
    exported = torch.export.load("kept.pt2").module()
    x = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), one.module.eval()(x))
        assert torch.allclose(exported(x), again(x), atol=1e-5)
    """,
]


def shown(cell: Any) -> dict[str, str]:
    """What the cell's last line is shown as."""
    (output,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return dict(output.data)


def test_two_processes_train_and_leave_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert os.environ["OMP_NUM_THREADS"] == "1"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in CELLS])
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    first, second, _ = notebook.cells
    result, report = shown(first), shown(second)
    assert result["text/plain"].startswith("RunResult(processes, 2 stages, 2 epochs, 46 steps, test accuracy ")
    assert len(result["text/plain"]) < 300
    assert len(result["text/html"]) < 6000
    assert result["text/html"].count("<svg") == 2
    assert "<script" not in result["text/html"] + report["text/html"]
    assert "http" not in result["text/html"] + report["text/html"]
    assert report["text/plain"].startswith("Evaluation(accuracy ")
    assert "label \\ taken for" in report["text/html"]
    # The live view: one frame of HTML that was drawn again and again, without ipywidgets.
    frames = [output for output in first.outputs if output.output_type == "display_data"]
    assert len(frames) == 1
    assert "epoch 2/2" in frames[0].data["text/html"]
    assert "Doubled" not in "".join(output.get("text", "") for output in first.outputs)
    assert not [output for output in first.outputs if output.get("name") == "stderr"]
