"""A trained network as a graph: it computes what the module computes, for any number of samples."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from residual import RESNET_LAYERS, ResNet
from torch import Tensor, nn

from unlocked import export
from unlocked.models import small_conv, split
from unlocked.rules import LLS
from unlocked.runtime import Trainer


def trained(model: Any, shape: tuple[int, ...]) -> tuple[Trainer, Tensor]:
    torch.manual_seed(0)
    x, labels = torch.randn(16, *shape), torch.arange(16) % 10
    one = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.Adam, lr=1e-2))
    one.fit((x, labels), epochs=1, batch_size=8, eval_data=(x, labels))
    return one, torch.randn(5, *shape)


def networks() -> dict[str, tuple[Any, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "SmallConv": (small_conv(1, 10, 8, dropout=0.2), (1, 8, 8)),
        "ResNet": (split(ResNet(), at=RESNET_LAYERS), (3, 16, 16)),
    }


@pytest.mark.parametrize("name", ["SmallConv", "ResNet"])
def test_torch_export_and_onnx_give_the_modules_scores(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    one, x = trained(*networks()[name])
    one.export(tmp_path / "kept.pt2")
    one.export(tmp_path / "kept.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.onnx", "kept.pt2"]
    assert one.module.training
    with torch.no_grad():
        expected = one.module.eval()(x)
        graph = torch.export.load(tmp_path / "kept.pt2").module()
        assert torch.allclose(graph(x), expected, atol=1e-5)
        assert torch.allclose(graph(x[:1]), expected[:1], atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "kept.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"samples": x.numpy()})
    assert torch.allclose(torch.from_numpy(scores), expected, atol=1e-4)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask[..., None].float()
        return self.linear((x * counts).sum(1) / counts.sum(1))


@pytest.mark.parametrize("rule", [LLS(), "BP"])
def test_named_tensors_are_inputs_by_their_names(rule: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    ids, mask = torch.randint(9, (16, 6)), (torch.arange(6) < torch.randint(1, 7, (16, 1))).long()
    data = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}
    one = Trainer([nn.Embedding(9, 8), Masked()], rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1))
    one.fit(data, epochs=1, batch_size=8)
    expected = one.predict(data)
    one.export(tmp_path / "kept.pt2")
    one.export(tmp_path / "kept.onnx")
    graph = torch.export.load(tmp_path / "kept.pt2").module()
    with torch.no_grad():
        assert torch.allclose(graph(ids, attention_mask=mask), expected, atol=1e-6)
        assert torch.allclose(graph(ids[:1], attention_mask=mask[:1]), expected[:1], atol=1e-6)
    session = onnxruntime.InferenceSession(tmp_path / "kept.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"samples": ids.numpy(), "attention_mask": mask.numpy()})
    assert torch.allclose(torch.from_numpy(scores), expected, atol=1e-5)


class Moody(nn.Module):
    """Its forward() depends on the values of its input, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) >= 0 else self.linear(-x)


def test_what_cannot_be_exported_is_one_line_and_is_still_saved(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = Trainer([Moody(), nn.Linear(4, 10)], rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    result = one.fit((torch.randn(16, 4), torch.arange(16) % 10), epochs=1, batch_size=8)
    told = r"^Sequential can't be exported to \.pt2: .*; its weights can be kept all the same"
    with pytest.raises(ValueError, match=told) as found:
        one.export(tmp_path / "kept.pt2")
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    result.save(tmp_path / "kept.safetensors")
    assert one.predict(torch.randn(3, 4)).shape == (3, 10)


def test_mistakes_are_told(tmp_path: Path) -> None:
    one, x = trained(small_conv(1, 10, 8), (1, 8, 8))
    with pytest.raises(ValueError, match=r"kept.tflite ends in .tflite; give a path that ends in .pt2 or .onnx"):
        one.export(tmp_path / "kept.tflite")
    with pytest.raises(ValueError, match="at least two rows"):
        export(one.module, tmp_path / "kept.pt2", x[:1])
    with pytest.raises(ValueError, match=r"nothing to export before fit\(\)"):
        Trainer(small_conv(1, 10, 8), rule=LLS(), optimizer=torch.optim.Adam).export(tmp_path / "kept.pt2")
