"""A list of layers as one plain module, and which networks can be named instead of being stored."""

import copy

import pytest
import torch
from residual import RESNET_LAYERS, ResNet
from torch import nn

from unlocked.models import MODELS, architecture_of, get_model, plain_module, rebuild, small_conv, split, use_tanh
from unlocked.models.registry import model_options


def test_what_was_cut_is_whole_again() -> None:
    whole = ResNet()
    blocks = split(whole, at=RESNET_LAYERS)
    assert plain_module(blocks) is whole
    copied = copy.deepcopy(blocks)
    assert isinstance(plain_module(copied), ResNet)
    assert plain_module(copied) is not whole
    # With a layer that the whole does not have, its names would be a lie.
    assert isinstance(plain_module([*blocks, nn.Linear(10, 3)]), nn.Sequential)
    blocks[2].body.add_module("layer2", nn.Conv2d(4, 4, 1))
    assert isinstance(plain_module(blocks), nn.Sequential)


def test_a_list_is_what_sequential_makes_of_it() -> None:
    layers = [nn.Linear(2, 3), nn.Linear(3, 4)]
    assert list(plain_module(layers).state_dict()) == list(nn.Sequential(*layers).state_dict())
    assert list(plain_module(nn.ModuleList(layers)).children()) == layers
    sequential = nn.Sequential(*layers)
    assert plain_module(sequential) is sequential


@pytest.mark.parametrize("name", MODELS)
def test_a_network_of_ours_is_rebuilt_from_its_name(name: str) -> None:
    options = {"upsample": False} if "upsample" in model_options(name) else {}
    blocks = get_model(name, in_channels=1, num_classes=7, image_size=(32, 32), dropout=0.3, **options)
    if name == "SmallConv":
        use_tanh(blocks)
    architecture = architecture_of(blocks)
    assert architecture is not None
    again = plain_module(rebuild(architecture))
    again.load_state_dict(plain_module(blocks).state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain_module(blocks).eval()(x), again.eval()(x))


def test_a_network_that_was_changed_has_no_name() -> None:
    blocks = small_conv()
    assert architecture_of(blocks) is not None
    assert architecture_of(blocks[1:]) is None
    blocks[0].body.add_module("act", nn.ReLU())
    assert architecture_of(blocks) is None
    assert architecture_of(split(ResNet(), at=RESNET_LAYERS)) is None
    assert architecture_of([nn.Linear(2, 2)]) is None
