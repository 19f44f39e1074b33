"""Cutting a network in one module into layers: the same function, the same parameters, and cuts that can't be."""

import pytest
import torch
import torch.nn.functional as F
from residual import RESNET_LAYERS, ResNet
from torch import Tensor, nn

from unlocked.models import KeyedDropout, split


@pytest.mark.parametrize(
    ("at", "names"),
    [
        (RESNET_LAYERS, ["conv1", *RESNET_LAYERS]),
        (["fc", "layer2"], ["conv1", "layer2", "fc"]),
        (["layer1", "layer1.1", "layer3.0"], ["conv1", "layer1", "layer1.1", "layer3.0"]),
        (["conv1", "layer2.1"], ["conv1", "layer2.1"]),
        (["bn1"], ["conv1", "bn1"]),
    ],
)
def test_the_layers_are_the_network(at: list[str], names: list[str]) -> None:
    network = ResNet().eval()
    x = torch.randn(3, 3, 32, 32)
    expected = network(x)
    blocks = split(network, at)
    assert [block.name for block in blocks] == names
    for block in blocks:
        x = block.eval()(x)
    assert torch.equal(x, expected)
    found = [parameter for block in blocks for parameter in block.parameters()]
    assert {id(p) for p in found} == {id(p) for p in network.parameters()}
    assert len(found) == len(list(network.parameters()))


def test_parameters_keep_their_names() -> None:
    network = ResNet()
    for block in split(network, RESNET_LAYERS):
        for name, parameter in block.named_parameters():
            assert network.get_parameter(name.removeprefix("body.")) is parameter


class _Cells(nn.Module):
    """Everything that a forward() may do between its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, factor: float = 1.5) -> Tensor:
        y = self.drop(F.relu(self.first(x * factor)))
        y = self.second(y * self.scale) + y
        return self.third(y.view(y.shape[0], -1))


def test_functions_parameters_and_defaults_between_modules() -> None:
    network = _Cells().eval()
    x = torch.randn(4, 6)
    expected = network(x)
    blocks = split(network, ["third"])
    y = x
    for block in blocks:
        y = block.eval()(y)
    assert torch.equal(y, expected)
    assert any(parameter is network.scale for parameter in blocks[0].parameters())
    assert any(isinstance(m, KeyedDropout) for m in blocks[0].modules())


class _Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if x.sum() > 0 else x


class _FunctionalDropout(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(self.first(x), 0.5, self.training))


class _TwoInputs(_Branching):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x) + y)


class _TwoOutputs(_Branching):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.first(x), self.second(x)


class _Unused(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


@pytest.mark.parametrize(
    ("module", "at", "message"),
    [
        (ResNet(), ["layer1", "layer5"], r"ResNet has no submodule 'layer5'; at its top are: conv1, bn1, .*layer4"),
        (ResNet(), ["layer1.0.conv2"], r"2 values cross the cut before 'layer1.0.conv2' \(maxpool, layer1_0_relu\)"),
        (ResNet(), ["layer1", "layer1"], "names a submodule twice"),
        (ResNet(), [], "at is a list of the submodules"),
        (ResNet(), "layer1", "at is a list of the submodules"),
        (_Cells(), ["second"], r"2 values cross the cut before 'second' \(drop, mul_1\)"),
        (_Branching(), ["second"], r"can't follow the forward\(\) of _Branching .*give a list of modules"),
        (_FunctionalDropout(), ["second"], r"calls dropout\(\) as a function.*nn.Dropout"),
        (_TwoInputs(), ["second"], "takes 2 inputs"),
        (_TwoOutputs(), ["second"], "gives a tuple"),
        (_Unused(), ["second"], "reaches no operation of second"),
    ],
)
def test_cuts_that_can_not_be(module: nn.Module, at: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(module, at)
