"""The network that the command line asks for."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlocked.data import ImageDataset
    from unlocked.models import Block

__all__ = ["build_model", "use_tanh"]


def build_model(name: str, training_mode: str, data: "ImageDataset", dropout: float) -> "list[Block]":
    """The blocks of the network called `name`, for images like those of `data`.

    The authors call the networks of their DFA runs DFA_SmallConvL and DFA_SmallConvLMNIST; both are SmallConvL. For
    DRTP they take tanh, as its inventors do, where the other rules have LeakyReLU.

    Raises:
        ValueError: the name is not known, or the images don't fit.
    """
    from unlocked.models import get_model

    if name.startswith("DFA_"):
        name = name.removeprefix("DFA_").removesuffix("MNIST")
    channels, height, _ = data.image_shape
    blocks = get_model(name, in_channels=channels, num_classes=data.num_classes, image_size=height, dropout=dropout)
    if training_mode == "DRTP":
        use_tanh(blocks)
    return blocks


def use_tanh(blocks: "list[Block]") -> None:
    """Puts tanh in the place of the LeakyReLU that ends a convolutional or linear block, in place."""
    from torch import nn

    from unlocked.models import ConvBlock, LinearBlock

    for block in blocks:
        if isinstance(block, ConvBlock | LinearBlock):
            block.body.add_module("act", nn.Tanh())
