"""A trained network in one file: what comes back, and what is refused."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unlocked import load
from unlocked.data import ImageDataset
from unlocked.models import small_conv
from unlocked.rules import LLS_M
from unlocked.runtime import RunResult, Trainer


def images(mean: tuple[float, ...] = (0.5,)) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (20, 1, 8, 8), generator=generator, dtype=torch.uint8)
    names = [f"class {n}" for n in range(4)]
    return ImageDataset(
        name="t", split="train", images=pixels, labels=torch.arange(20) % 4, num_classes=4, mean=mean, classes=names
    )


def fit(model: Any, data: Any = None) -> tuple[Trainer, RunResult]:
    trainer = Trainer(model, rule=LLS_M(), optimizer=partial(torch.optim.SGD, lr=0.1))
    data = images() if data is None else data
    return trainer, trainer.fit(data, epochs=1, batch_size=5, eval_data=data)


def test_a_network_of_ours_comes_back_by_its_name_alone(tmp_path: Path) -> None:
    trainer, result = fit(small_conv(1, 4, 8))
    path = tmp_path / "new" / "kept.safetensors"
    result.save(path)
    again = load(path)
    assert not again.training
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), trainer.module.eval()(x))
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["unlocked"])
        assert set(file.keys()) == set(result.state_dict())
    assert about["mean"] == [0.5]
    assert about["classes"][3] == "class 3"
    assert about["input_shape"] == [1, 8, 8]
    assert about["figures"]["weights_sha256"] == result.weights_sha256
    assert not [name for name in result.state_dict() if "rule" in name]
    assert [name for name in result.weights if ".rule." in name]


class Tied(nn.Module):
    """Two names of one weight, and a buffer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.register_buffer("unused", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_any_other_network_takes_its_weights_strictly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.randn(20, 8), torch.arange(20) % 4
    trainer, result = fit(nn.Sequential(Tied(), nn.Linear(8, 4)), data)
    result.save(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"the weights of a Sequential, .* give it, as in load\(path, MyNetwork\(\)\)"):
        load(tmp_path / "kept")
    again = load(tmp_path / "kept", nn.Sequential(Tied(), nn.Linear(8, 4)))
    assert torch.equal(again(data[0]), trainer.module.eval()(data[0]))
    assert torch.equal(load(tmp_path / "kept", [Tied(), nn.Linear(8, 4)])(data[0]), again(data[0]))
    told = (
        "don't fit Sequential: missing: 0.weight, 0.bias; unexpected: .* and 2 more; other shapes or types: 1.weight is"
    )
    with pytest.raises(ValueError, match=told):
        load(tmp_path / "kept", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)))
    with pytest.raises(ValueError, match="model is a str; give a module, or a list of modules"):
        load(tmp_path / "kept", "SmallConv")  # type: ignore[arg-type]


def test_what_is_no_such_file_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    _, result = fit(small_conv(1, 4, 8))
    path = tmp_path / "kept.safetensors"
    with pytest.raises(ValueError, match=r"kept.safetensors is not a file; give what RunResult.save has written"):
        load(path)
    result.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged: the weights are not those that were written"):
        load(path)
    for broken in (whole[:100], b"", b"{}", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"is no file that RunResult.save wrote, or is damaged"):
            load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"is no file that RunResult.save wrote"):
        load(path)


def test_a_result_is_shown_in_one_line_and_as_a_small_card() -> None:
    _, result = fit(small_conv(1, 4, 8))
    text, html = repr(result), result._repr_html_()
    assert "\n" not in text
    assert len(text) < 300
    assert f"test accuracy {result.test_acc1:.2f} %" in text
    assert html.count("<svg") == 2
    assert len(html) < 6000
    result.epochs[0] = replace(result.epochs[0], train_loss=float("nan"))
    assert "nan" not in result._repr_html_().lower()
    assert repr(RunResult(engine="processes", stages=[["a"]])).endswith("one stage's weights)")
    with pytest.raises(ValueError, match="under torchrun rank 0 has them all"):
        RunResult(engine="processes", stages=[["a"]]).state_dict()
