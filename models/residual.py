"""Residual networks, cut into layers as the literature on local modules cuts them.

ResNet-32 and ResNet-110 are those of He et al. (CVPR 2016) for small images, with a 1 x 1 convolution where a block
changes the width, as InfoPro (Wang et al., ICLR 2021), AugLocal (Ma et al., ICLR 2024) and MAN (Su et al., ECCV 2024)
train them; ResNet-18 is theirs for ImageNet. A residual block is a layer, or several are one; with `cut_blocks` it is
two layers, and what skips the first travels beside its output.

Without `local_module_num` the stem, every residual block and the classifier are a layer each. With K they are K layers,
the last of which ends in the classifier and trains on its cross-entropy, as in InfoPro; K = 1 is the whole network.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlocked.kernels.images import sides_of
from unlocked.models.blocks import Block, Origin, OutputBlock
from unlocked.models.initialisation import draw_by_layer
from unlocked.models.sizes import check_positive, latent_side

__all__ = ["ResidualBlock", "local_module_sizes", "resnet18", "resnet32", "resnet110"]

_NARROW = (16, 32, 64)
_LARGE_STEM_FROM = 96  # pixels of the smaller side


class ResidualBlock(nn.Module):
    """Conv 3x3, BatchNorm, ReLU, [dropout], Conv 3x3, BatchNorm, added to the input (through a 1 x 1 convolution and
    BatchNorm where the shape changes), ReLU: [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride]."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm=nn.BatchNorm2d(out_channels)
                )
            )
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.act1(self.norm1(self.conv1(x))))
        result: Tensor = self.act2(self.norm2(self.conv2(y)) + self.shortcut(x))
        return result


class FirstHalf(nn.Module):
    """A residual block up to its first ReLU: [B, in_channels, H, W] -> [B, out_channels, H / stride, W / stride].

    `skipped` is what the second half needs of the input, until the block's tail sends it on in the same call: every
    `stride`-th pixel, the only ones that the block's 1 x 1 convolution reads.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.stride = stride
        self.skipped: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.skipped = x[:, :, :: self.stride, :: self.stride]
        result: Tensor = self.act1(self.norm1(self.conv1(x)))
        return result


class Beside(nn.Module):
    """The tail of a first half: its activations, and behind their channels those of what skips it."""

    def __init__(self, half: FirstHalf) -> None:
        super().__init__()
        self._half = (half,)  # no part of the tail, whose parameters its own would be

    def forward(self, activations: Tensor) -> Tensor:
        (half,) = self._half
        skipped, half.skipped = half.skipped, None
        assert skipped is not None, "the body has run before its tail"
        return torch.cat([activations, skipped], 1)


class SecondHalf(nn.Module):
    """The rest of a residual block, of what `Beside` gives: [B, out_channels + in_channels, H, W] -> [B, out_channels,
    H, W]. The shortcut has a convolution where the block's has one."""

    def __init__(self, in_channels: int, out_channels: int, *, projects: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.sizes = (out_channels, in_channels)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if projects:
            conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y, skipped = x.split(self.sizes, 1)
        result: Tensor = self.act2(self.norm2(self.conv2(self.dropout(y))) + self.shortcut(skipped))
        return result


def resnet18(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    local_module_num: int | None = None,
    cut_blocks: bool = False,
    seed: int = 0,
) -> list[Block]:
    """ResNet-18: widths 64, 128, 256, 512, two residual blocks each. Arguments and errors as `resnet32`.

    The stem is a 3 x 3 convolution for small images; from 96 pixels on (the smaller side) it is ImageNet's, a 7 x 7
    convolution of stride 2 and a 3 x 3 max pool of stride 2.
    """
    large = min(sides_of(image_size)) >= _LARGE_STEM_FROM
    widths = (64, 128, 256, 512)
    sizes = (in_channels, num_classes, image_size, dropout)
    return _resnet("ResNet18", widths, 2, large, *sizes, local_module_num, cut_blocks, seed)


def resnet32(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    local_module_num: int | None = None,
    cut_blocks: bool = False,
    seed: int = 0,
) -> list[Block]:
    """ResNet-32: a stem of 16 channels, then widths 16, 32, 64 with five residual blocks each.

    Args:
        local_module_num: K of InfoPro and AugLocal, 1 to 16: the network as K layers, the last with the classifier.
            None: 17 layers, the stem, each residual block, and the classifier for itself.
        cut_blocks: every residual block is two layers, cut behind its first ReLU. What skips the first of them travels
            beside its output, as further channels. Not with `local_module_num`.
        dropout: probability, inside every residual block, between its convolutions.
        in_channels, num_classes, image_size, seed: see `unlocked.models.small_conv`. Any image fits.

    Raises:
        ValueError: a size is not positive, more local modules than the stem and the residual blocks are, or both ways
            to cut.
    """
    sizes = (in_channels, num_classes, image_size, dropout)
    return _resnet("ResNet32", _NARROW, 5, False, *sizes, local_module_num, cut_blocks, seed)


def resnet110(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    local_module_num: int | None = None,
    cut_blocks: bool = False,
    seed: int = 0,
) -> list[Block]:
    """ResNet-110: as `resnet32`, with 18 residual blocks of each width, and 1 to 55 local modules."""
    sizes = (in_channels, num_classes, image_size, dropout)
    return _resnet("ResNet110", _NARROW, 18, False, *sizes, local_module_num, cut_blocks, seed)


def local_module_sizes(units: int, count: int) -> list[int]:
    """How many of `units` (the stem and the residual blocks) each of `count` local modules holds.

    As even as possible. What is left over goes to the last modules, with 2 or 3 of them to the first: the cuts of
    InfoPro's published configurations for ResNet-32 and ResNet-110, with 2, 3, 4, 8 and 16 modules.
    """
    size, more = divmod(units, count)
    rest = range(more) if count <= 3 else range(count - more, count)
    return [size + (i in rest) for i in range(count)]


def _resnet(
    network: str,
    widths: Sequence[int],
    depth: int,
    large_stem: bool,
    in_channels: int,
    num_classes: int,
    image_size: int | Sequence[int],
    dropout: float,
    local_module_num: int | None,
    cut_blocks: bool,
    seed: int,
) -> list[Block]:
    check_positive(in_channels=in_channels, num_classes=num_classes, local_module_num=local_module_num)
    count, units = local_module_num, 1 + depth * len(widths)
    if count is not None and count > units:
        raise ValueError(
            f"local_module_num is {count}, but the stem and {units - 1} residual blocks make at most {units} local "
            f"modules; give 1 to {units}, or none for a layer each and the classifier as one more"
        )
    if cut_blocks and count is not None:
        raise ValueError(f"local_module_num is {count} and cut_blocks True, two ways to cut; give one of them")
    parts, widths_out, sides = _units(widths, depth, large_stem, in_channels, sides_of(image_size), dropout)
    makers: list[Callable[[], Block]] = []
    first = 0
    for number, size in enumerate([1] * units if count is None else local_module_sizes(units, count)):
        stop = first + size
        name = f"module{number + 1}" if count is not None else f"block{number}" if number else "stem"
        width = widths_out[stop - 1]
        p = latent_side(width, sides[stop - 1], most=1024)
        if stop == units and count is not None:
            makers.append(partial(_last_module, name, parts[first:stop], width, num_classes))
        elif cut_blocks and number:
            entering, stride = widths_out[number - 1], 2 if number > 1 and (number - 1) % depth == 0 else 1
            shape = _Half(name, entering, width, p, projects=stride != 1 or entering != width)
            makers.append(partial(_first_half, shape, stride))
            makers.append(partial(_second_half, shape, dropout, pooled=stop == units))
        else:
            makers.append(partial(_module, name, parts[first:stop], p, min(100, width * p * p), pooled=stop == units))
        first = stop
    if count is None:
        makers.append(partial(OutputBlock, widths_out[-1], num_classes))
    built: dict[str, Any] = {"in_channels": in_channels, "num_classes": num_classes, "image_size": sides_of(image_size)}
    built |= {"dropout": dropout, "local_module_num": local_module_num} | ({"cut_blocks": True} if cut_blocks else {})
    origin = Origin(architecture=(network, built))
    return draw_by_layer(makers, seed, origin)


_Makers = list[Callable[[], nn.Module]]


def _units(
    widths: Sequence[int],
    depth: int,
    large_stem: bool,
    in_channels: int,
    sides: tuple[int, int],
    dropout: float,
) -> tuple[_Makers, list[int], list[tuple[int, int]]]:
    """What makes the stem and each residual block; the channels, and height and width, that each of them gives."""
    makers: _Makers = [partial(_stem, in_channels, widths[0], large_stem)]
    for _ in range(2 if large_stem else 0):
        sides = _halved(sides)
    channels, places = [widths[0]], [sides]
    for stage, width in enumerate(widths):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            makers.append(partial(ResidualBlock, channels[-1], width, stride=stride, dropout=dropout))
            channels.append(width)
            places.append(_halved(places[-1]) if stride == 2 else places[-1])
    return makers, channels, places


def _halved(sides: tuple[int, int]) -> tuple[int, int]:
    return (sides[0] + 1) // 2, (sides[1] + 1) // 2


def _stem(in_channels: int, width: int, large: bool) -> nn.Module:
    size, stride, padding = (7, 2, 3) if large else (3, 1, 1)
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, width, size, stride, padding, bias=False), norm=nn.BatchNorm2d(width), act=nn.ReLU()
    )
    if large:
        parts["pool"] = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(parts)


def _module(name: str, makers: _Makers, latent_size: int, reduced_rank: int, *, pooled: bool) -> Block:
    """Units as one layer; `pooled`: the mean over all places is what the classifier reads."""
    body = nn.Sequential(*(make() for make in makers))
    tail = nn.AdaptiveAvgPool2d(1) if pooled else None
    return Block(name, body, tail, latent_size=latent_size, hidden=2048, reduced_rank=reduced_rank)


class _Half(NamedTuple):
    """What both halves of a residual block are told."""

    name: str
    in_channels: int
    out_channels: int
    latent_size: int
    projects: bool

    def block(self, part: str, body: nn.Module, tail: nn.Module | None) -> Block:
        rank = min(100, self.out_channels * self.latent_size**2)
        name = f"{self.name}_{part}"
        return Block(name, body, tail, latent_size=self.latent_size, hidden=2048, reduced_rank=rank)


def _first_half(half: _Half, stride: int) -> Block:
    body = FirstHalf(half.in_channels, half.out_channels, stride=stride)
    return half.block("first", body, Beside(body))


def _second_half(half: _Half, dropout: float, *, pooled: bool) -> Block:
    body = SecondHalf(half.in_channels, half.out_channels, projects=half.projects, dropout=dropout)
    return half.block("second", body, nn.AdaptiveAvgPool2d(1) if pooled else None)


def _last_module(name: str, makers: _Makers, width: int, num_classes: int) -> Block:
    classifier = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(width, num_classes))
    body = nn.Sequential(*(make() for make in makers), nn.Sequential(classifier))
    return Block(name, body, is_output=True)
