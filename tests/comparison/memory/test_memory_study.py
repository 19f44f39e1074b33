"""Peak activation memory: law 3, counted to the byte, and against what autograd says that it saves."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unlocked.comparison.memory.chain import chain
from unlocked.comparison.memory.results import ACCUMULATED, BP, CHECKPOINTED, ChainSettings, MemoryStudy
from unlocked.comparison.memory.study import main, measure

SETTINGS = ChainSettings(channels=4, image_size=8, batch_size=8)


def saved_bytes(depth: int) -> int:
    """What autograd keeps for the backward pass of a chain: the storages that its saved tensors lie in, each once."""
    network = nn.Sequential(*chain(depth, SETTINGS)).to(memory_format=torch.channels_last)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(8, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("rule", "kernels"), [("LLS", "auto"), ("LLS_MxM", "torch")])
def test_a_local_rule_needs_one_layer_whatever_the_depth(rule: str, kernels: str) -> None:
    settings = ChainSettings(channels=4, image_size=8, batch_size=8, kernels=kernels)
    points = [measure(rule, depth, settings) for depth in (3, 6, 18)]
    assert len({point.activation_bytes for point in points}) == 1
    assert [point.held_bytes for point in points] == [0, 0, 0]
    assert points[0].activation_bytes < 12 * settings.activation_bytes


def test_backpropagation_needs_what_autograd_saves() -> None:
    few, many = measure(BP, 8, SETTINGS), measure(BP, 24, SETTINGS)
    assert few.held_bytes == many.held_bytes == 0
    slope = (many.activation_bytes - few.activation_bytes) / 16
    saved = (saved_bytes(24) - saved_bytes(8)) / 16
    assert slope == pytest.approx(saved, rel=0.02)
    assert saved >= 3 * SETTINGS.activation_bytes  # input of convolution, normalisation and activation


def test_checkpoints_lie_between() -> None:
    depth = 36
    local, checkpointed, whole = (measure(m, depth, SETTINGS).activation_bytes for m in ("LLS", CHECKPOINTED, BP))
    assert local < checkpointed < whole / 2


def test_accumulated_gradients_need_the_activations_of_a_chunk() -> None:
    """And all gradients at once beside them: a quarter of the slope, plus the weights'."""
    few, many = measure(ACCUMULATED, 8, SETTINGS), measure(ACCUMULATED, 24, SETTINGS)
    whole_few, whole_many = measure(BP, 8, SETTINGS), measure(BP, 24, SETTINGS)
    assert few.held_bytes == many.held_bytes == 0
    slope = (many.activation_bytes - few.activation_bytes) / 16
    whole = (whole_many.activation_bytes - whole_few.activation_bytes) / 16
    gradients = 4 * sum(p.numel() for p in chain(24, SETTINGS)[3].parameters())
    assert slope == pytest.approx(whole / 4 + gradients, rel=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--depths", "2", "6", "4", "--channels", "4", "--image-size", "8", "--batch-size", "4"]
    assert main([*flags, "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "LLS: 0.00 KiB per block" in output
    study = MemoryStudy.load(tmp_path / "memory.json")
    assert study.methods == ["BP", "BP, checkpointed", "BP, accumulated", "LLS"]
    assert [point.depth for point in study.of("LLS")] == [2, 4, 6]
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    assert lines[0] == "method,depth,activation_bytes,persistent_bytes,held_bytes"
    assert len(lines) == 13


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depths", "4"], "two different depths"),
        (["--depths", "0", "4"], "depths is 0; it must be at least 1"),
        (["--channels", "0"], "channels is 0"),
        (["--training-mode", "nonsense"], "nonsense"),
    ],
)
def test_mistakes(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([*flags, "--output", str(tmp_path)])
