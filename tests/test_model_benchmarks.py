"""benchmarks/models.py: its counts against torch's and a paper's, and its tables."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports modules of benchmarks/ when a test asks."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def test_models_count_multiply_adds_as_torch_does(load: Any) -> None:
    """Forward against torch's own counter; a local step once more for the weights, and inside a layer for its input."""
    from torch.utils.flop_counter import FlopCounterMode

    from unlocked.models import get_model
    from unlocked.runtime.network import build_network

    models = load("models")
    network = build_network(get_model("MobileNetV1_small"), input_shape=(3, 32, 32), num_classes=10, seed=0)
    counts = models.multiply_adds(network)
    x = torch.zeros(2, 3, 32, 32)
    for block, info, (forward, step) in zip(network.blocks, network.infos, counts, strict=True):
        block.eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            x = block(x)
        assert forward == counter.get_total_flops() // 2 // len(x)
        weights = [m.weight for m in block.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        pointwise = weights[1].numel() * info.activation_shape[1] ** 2 if len(weights) == 2 else 0
        head = 0 if block.is_output else 2 * 10 * info.num_latents
        assert step == 2 * forward + pointwise + head


def test_models_counts_sizes(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Of networks whose figures are known: ResNet-32 has 69 million multiply-adds (He et al., CVPR 2016)."""
    models = load("models")
    assert models.main(["sizes", "--models", "ResNet32", "MLP"]) == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    resnet, mlp = rows[2:]
    assert resnet[:3] == ["ResNet32", "17", "466,906"]
    assert float(resnet[3]) / 2 == pytest.approx(69, abs=0.5)
    assert float(resnet[4]) == 16 * 32 * 32 * 4 / 1024
    operations = 2 * (3072 * 1024 + 2 * 1024 * 1024 + 1024 * 10) / 1e6
    assert mlp == ["MLP", "4", "5,262,346", f"{operations:.1f}", "4.0", "12.0", "12.0"]


def test_models_prints_costs_and_losses(load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = load("models")
    threads = torch.get_num_threads()
    small = ["--models", "SmallConv", "--image-size", "8", "--batch-size", "4", "--repeats", "1"]
    assert models.main(["cost", *small, "--json", str(tmp_path / "cost.json")]) == 0
    (row,) = json.loads((tmp_path / "cost.json").read_text())["models"]
    assert row["parameters"] == 362_506
    assert sum(layer[4] for layer in row["layers"]) == pytest.approx(row["seconds"])
    assert set(row["stages"]) == {"2", "4"}  # five layers make no eight stages
    assert 0.25 <= row["stages"]["4"]["largest_share"] <= 1
    assert models.main(["losses", "--model", "SmallConv", "--dataset", "digits", "--max-steps", "10"]) == 0
    printed = capsys.readouterr().out
    assert "| SmallConv | 5 |" in printed
    assert "SmallConv, 10 steps of 64: every layer's loss falls" in printed or "NOT every" in printed
    torch.set_num_threads(threads)
