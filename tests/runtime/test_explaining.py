"""`Trainer.explain` and `unlocked explain`: what is closed, joined or left to autograd, and what it costs."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from unlocked.launch.console import main
from unlocked.models import small_conv, vit
from unlocked.rules import LLS, get_rule
from unlocked.runtime import Trainer


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, 8, 8, generator=generator), torch.arange(64) % 10


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(512, 10)),
    )


def test_every_layer_says_what_becomes_of_its_operations() -> None:
    net = _net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = partial(torch.optim.SGD, lr=0.1)
    found = Trainer(net, rule=LLS(), optimizer=optimizer).explain(_data(), batch_size=16)
    first, second, last = found.layers
    assert [(call.how, call.operations) for call in first.calls] == [
        ("closed", ("0",)),
        ("joined", ("1", "2", "latents")),
    ]
    hows = [call.how for call in second.calls]
    assert hows in (["closed", "autograd", "joined"], ["closed", "autograd", "closed", "closed"])  # with C++, without
    assert second.calls[1].why == "1: InstanceNorm2d is not in the table"
    assert first.is_closed
    assert not second.is_closed
    assert last.is_closed
    pixels = 16 * 64
    assert first.flops == 2 * (2 * pixels * 27 * 8)  # forward and weight gradient
    assert second.flops == 2 * (2 * pixels * 72 * 8)
    assert first.saved_bytes >= 4 * pixels * (3 + 8)
    assert all(layer.floor_seconds > 0 for layer in found.layers)
    assert "    autograd 1: 1: InstanceNorm2d is not in the table" in str(found)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["layers"][1]["calls"][1]["how"] == "autograd"
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("rule", ["LLS", "BP", "ForwardForward", "SoftHebb"])
def test_any_rule_can_be_explained(rule: str) -> None:
    model = small_conv(3, 10, 8)
    known = rule if rule == "BP" else get_rule(rule, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    found = Trainer(model, rule=known, optimizer=partial(torch.optim.Adam, lr=0.01)).explain(_data(), batch_size=16)
    assert [layer.is_closed for layer in found.layers][-1] == (rule != "BP")
    if rule == "LLS":
        assert all(layer.is_closed for layer in found.layers)
    else:
        autograd = [[call.why for call in layer.calls if call.how == "autograd"] for layer in found.layers[:-1]]
        assert all(reasons and all(reasons) for reasons in autograd)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = tmp_path / "explained.json"
    given = ["explain", "--dataset", "digits", "--batch-size", "16", "--summary", str(summary)]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "micro-batches of 16 on cpu, fp32, kernels auto"
    assert "    joined   norm, act, latents, tail: in one pass each way" in lines
    assert json.loads(summary.read_text())["layers"][0]["name"] == "conv1"
    assert main(["explain", "--model", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_vision_transformer_is_closed() -> None:
    model = vit(3, 10, 8, width=16, depth=2)
    found = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.Adam, lr=0.01)).explain(_data(), batch_size=16)
    assert all(layer.is_closed for layer in found.layers)
