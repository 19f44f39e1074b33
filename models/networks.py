"""The authors' networks (Apolinario et al., WACV 2025) from one table, as lists of blocks.

What a row says: kind, width, latent size, stride, and whether a 2x2 max pool follows. The last convolutional
block ends in an adaptive average pool; a linear block reads its output flattened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from unlocked.kernels.images import sides_of
from unlocked.models.blocks import Block, ConvBlock, DepthwiseBlock, LinearBlock, Origin, OutputBlock, Pool
from unlocked.models.initialisation import draw_by_layer
from unlocked.models.sizes import check_positive, too_small

__all__ = ["mobilenet_v1", "mobilenet_v1_small", "small_conv", "small_conv_l", "vgg8", "vgg11"]


class _Row(NamedTuple):
    kind: Literal["conv", "depthwise", "linear"]
    width: int
    latent_size: int  # side of the pooling; for linear, the number of latents
    stride: int = 1
    max_pool: bool = False


@dataclass(frozen=True)
class _Network:
    name: str  # as in the registry
    rows: tuple[_Row, ...]
    average: int  # side of the adaptive average pool after the last convolutional block
    hidden: int | None  # None: as wide as the layer's own latents
    reduced_rank: int


def _conv(width: int, latent_size: int, *, stride: int = 1, max_pool: bool = False) -> _Row:
    return _Row("conv", width, latent_size, stride, max_pool)


def _dw(width: int, latent_size: int, *, stride: int = 1) -> _Row:
    return _Row("depthwise", width, latent_size, stride)


def _linear(width: int, latent_size: int) -> _Row:
    return _Row("linear", width, latent_size)


_SMALL_CONV = _Network(
    "SmallConv",
    (_conv(32, 4, max_pool=True), _conv(64, 2, max_pool=True), _conv(128, 2), _linear(512, 512)),
    average=2,
    hidden=None,
    reduced_rank=20,
)
_SMALL_CONV_L = _Network(
    "SmallConvL",
    (_conv(96, 4, max_pool=True), _conv(192, 2, max_pool=True), _conv(512, 2), _linear(1024, 2048)),
    average=2,
    hidden=None,
    reduced_rank=20,
)
_VGG8 = _Network(
    "VGG8",
    (
        _conv(128, 4),
        _conv(256, 2, max_pool=True),
        _conv(256, 2),
        _conv(256, 2, max_pool=True),
        _conv(512, 2, max_pool=True),
        _conv(512, 2),
        _linear(1024, 1024),
    ),
    average=2,
    hidden=2048,
    reduced_rank=100,
)
_VGG11 = _Network(
    "VGG11",
    (
        _conv(64, 4, max_pool=True),
        _conv(128, 2, max_pool=True),
        _conv(256, 2),
        _conv(256, 2, max_pool=True),
        _conv(512, 2),
        _conv(512, 2, max_pool=True),
        _conv(512, 2),
        _conv(512, 2),
        _linear(4096, 2048),
        _linear(4096, 2048),
    ),
    average=8,
    hidden=2048,
    reduced_rank=100,
)
_MOBILENET_V1 = _Network(
    "MobileNetV1",
    (
        _conv(32, 8, stride=2),
        _dw(64, 4),
        _dw(128, 4, stride=2),
        _dw(128, 4),
        _dw(256, 2, stride=2),
        _dw(256, 2),
        _dw(512, 2, stride=2),
        *[_dw(512, 2)] * 5,
        _dw(1024, 1, stride=2),
        _dw(1024, 1),
    ),
    average=1,
    hidden=2048,
    reduced_rank=20,
)


def small_conv(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """SmallConv: three convolutional blocks (32, 64, 128), one linear block (512), the output layer.

    Args:
        in_channels: of the images [B, in_channels, height, width].
        num_classes: the output layer's width.
        image_size: side of square images in pixels, or height and width of others.
        dropout: probability, after every pool.
        upsample: the authors' adaptive pools repeat values where they are asked for more than there are (SmallConvL's
            2048 latents of 1024 activations, VGG11's 8 x 8 of 2 x 2 pixels at 32). False: no pool gives more values
            than it is given, which also makes the layer after it smaller. With True no weight depends on image_size.
        seed: keys the start values, layer by layer; the global generator is neither asked nor moved. A `Trainer` with
            another seed draws what is still as it was drawn here by its own.

    Raises:
        ValueError: a size is not positive, or the image is too small for a max pool (names the block and sizes).
    """
    return _build(_SMALL_CONV, in_channels, num_classes, image_size, dropout, upsample=upsample, seed=seed)


def small_conv_l(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """SmallConvL: SmallConv with widths 96, 192, 512 and 1024. Arguments and errors as `small_conv`.

    The linear block has 1024 activations and 2048 latents: adaptive pooling repeats each of them unless `upsample` is
    False.
    """
    return _build(_SMALL_CONV_L, in_channels, num_classes, image_size, dropout, upsample=upsample, seed=seed)


def vgg8(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """VGG8: six convolutional blocks and one linear block. Arguments and errors as `small_conv`."""
    return _build(_VGG8, in_channels, num_classes, image_size, dropout, upsample=upsample, seed=seed)


def vgg11(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """VGG11: eight convolutional blocks and two linear blocks. Arguments and errors as `small_conv`.

    Made for larger images: at 32 pixels the last convolutional block holds 2 x 2 pixels, which the adaptive pool
    to 8 x 8 repeats (and the first linear block has 134 million weights) unless `upsample` is False.
    """
    return _build(_VGG11, in_channels, num_classes, image_size, dropout, upsample=upsample, seed=seed)


def mobilenet_v1(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    same_padding: bool = False,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """MobileNetV1: a strided convolution and thirteen depthwise-separable blocks. Arguments and errors as `small_conv`.

    `same_padding`: pad depthwise convolutions by 1, where the authors pad by the stride (see `DepthwiseBlock`).
    """
    network = replace(_MOBILENET_V1, reduced_rank=100) if num_classes > 200 else _MOBILENET_V1
    return _build(network, in_channels, num_classes, image_size, dropout, same_padding, upsample, seed=seed)


def mobilenet_v1_small(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    same_padding: bool = False,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """The first eight blocks of MobileNetV1. Arguments and errors as `mobilenet_v1`."""
    network = replace(_MOBILENET_V1, name="MobileNetV1_small", rows=_MOBILENET_V1.rows[:8])
    return _build(network, in_channels, num_classes, image_size, dropout, same_padding, upsample, seed=seed)


def _build(
    network: _Network,
    in_channels: int,
    num_classes: int,
    image_size: int | Sequence[int],
    dropout: float,
    same_padding: bool = False,
    upsample: bool = True,
    *,
    seed: int,
) -> list[Block]:
    check_positive(in_channels=in_channels, num_classes=num_classes)
    height, width = sides_of(image_size)
    makers: list[Callable[[], Block]] = []
    sizes = {"in_channels": in_channels, "num_classes": num_classes, "image_size": (height, width), "dropout": dropout}
    origin = Origin(architecture=(network.name, {**sizes, "same_padding": same_padding, "upsample": upsample}))
    counts = {"conv": 0, "depthwise": 0, "linear": 0}
    last_conv = max(i for i, row in enumerate(network.rows) if row.kind != "linear")
    features, sides = in_channels, [height, width]
    for i, row in enumerate(network.rows):
        counts[row.kind] += 1
        name = f"{row.kind}{counts[row.kind]}"
        pool: Pool = "average" if i == last_conv else "max" if row.max_pool else "none"
        if row.kind != "linear":
            padding = row.stride if row.kind == "depthwise" and not same_padding else 1
            sides = [(side + 2 * padding - 3) // row.stride + 1 for side in sides]
        if pool == "max" and min(sides) < 2:
            raise too_small(name, (sides[0], sides[1]), (height, width))
        if not upsample:
            most = row.width if row.kind == "linear" else min(sides)
            row = row._replace(latent_size=min(row.latent_size, most))
            network = replace(network, average=min(network.average, *sides)) if i == last_conv else network
        makers.append(partial(_make_block, network, row, name, features, pool, dropout, same_padding))
        features = row.width * (network.average**2 if i == last_conv else 1)
        sides = [side // 2 for side in sides] if pool == "max" else sides
    makers.append(partial(OutputBlock, features, num_classes))
    return draw_by_layer(makers, seed, origin)


def _make_block(
    network: _Network, row: _Row, name: str, features: int, pool: Pool, dropout: float, same_padding: bool
) -> Block:
    """One row as a block. Dropout follows the pools, so a block without one has none."""
    latents = row.latent_size if row.kind == "linear" else row.width * row.latent_size**2
    hidden = latents if network.hidden is None else network.hidden
    if row.kind == "linear":
        return LinearBlock(
            features,
            row.width,
            name=name,
            latent_size=row.latent_size,
            hidden=hidden,
            reduced_rank=network.reduced_rank,
        )
    pool_size = network.average if pool == "average" else None
    dropout = 0.0 if pool == "none" else dropout
    if row.kind == "conv":
        return ConvBlock(
            features,
            row.width,
            name=name,
            stride=row.stride,
            pool=pool,
            pool_size=pool_size,
            dropout=dropout,
            latent_size=row.latent_size,
            hidden=hidden,
            reduced_rank=network.reduced_rank,
        )
    return DepthwiseBlock(
        features,
        row.width,
        name=name,
        stride=row.stride,
        same_padding=same_padding,
        pool=pool,
        pool_size=pool_size,
        dropout=dropout,
        latent_size=row.latent_size,
        hidden=hidden,
        reduced_rank=network.reduced_rank,
    )
