"""The networks of predictive similarity (Nokland and Eidnes, "Training Neural Networks with Local Error Signals", ICML
2019): VGG8B, VGG11B and the multi-layer perceptron, as lists of blocks.

Widths and pools are those of the paper's code (the names vgg8b, vgg11b and mlp there). Every hidden layer is a
convolution or a linear map, BatchNorm and LeakyReLU; its loss sees what leaves the LeakyReLU, before the pool.
"""

from collections.abc import Callable, Sequence
from functools import partial

from unlocked.kernels.images import sides_of
from unlocked.models.blocks import Block, ConvBlock, LinearBlock, Origin, OutputBlock
from unlocked.models.initialisation import draw_by_layer
from unlocked.models.sizes import check_positive, latent_side, too_small

__all__ = ["mlp", "vgg8b", "vgg11b"]

_POOL = "pool"
_VGG8B = (128, 256, _POOL, 256, 512, _POOL, 512, _POOL, 512, _POOL)
_VGG11B = (128, 128, 128, 256, _POOL, 256, 512, _POOL, 512, 512, _POOL, 512, _POOL)
_HIDDEN = 1024  # of the one linear layer before the output


def vgg8b(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    feat_mult: int = 1,
    seed: int = 0,
) -> list[Block]:
    """VGG8B: six convolutional blocks (128, 256, 256, 512, 512, 512) with four pools, one linear block, the output.

    The paper has 8.9 million parameters for CIFAR-10 and 7.3 million for MNIST.

    Args:
        feat_mult: the factor of the convolutions' widths, the paper's VGG8B(2x) and (3x).
        dropout: probability, after every hidden block's activations and its pool.
        in_channels, num_classes, image_size, seed: see `unlocked.models.small_conv`.

    Raises:
        ValueError: a size is not positive, or the image has fewer than 16 x 16 pixels (names the block and the sizes).
    """
    return _vgg("VGG8B", _VGG8B, in_channels, num_classes, image_size, dropout, feat_mult, seed)


def vgg11b(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    feat_mult: int = 1,
    seed: int = 0,
) -> list[Block]:
    """VGG11B: nine convolutional blocks (128 x 3, 256 x 2, 512 x 4) with four pools, one linear block, the output.

    The paper has 12 million parameters for CIFAR-10. Arguments and errors as `vgg8b`.
    """
    return _vgg("VGG11B", _VGG11B, in_channels, num_classes, image_size, dropout, feat_mult, seed)


def mlp(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    width: int = 1024,
    depth: int = 3,
    seed: int = 0,
) -> list[Block]:
    """A multi-layer perceptron: `depth` linear blocks of `width`, the output. The paper's has 3 of 1024, and 3 of 3000
    on CIFAR-10.

    Args:
        dropout: probability, after every hidden block's activations.
        in_channels, num_classes, image_size, seed: see `unlocked.models.small_conv`.

    Raises:
        ValueError: a size is not positive.
    """
    check_positive(in_channels=in_channels, num_classes=num_classes, width=width, depth=depth)
    height, breadth = sides_of(image_size)
    features = [in_channels * height * breadth, *[width] * depth]
    makers: list[Callable[[], Block]] = [
        partial(_linear, features[i], width, f"linear{i + 1}", dropout) for i in range(depth)
    ]
    sizes = {
        "in_channels": in_channels,
        "num_classes": num_classes,
        "image_size": (height, breadth),
        "dropout": dropout,
    }
    origin = Origin(architecture=("MLP", {**sizes, "width": width, "depth": depth}))
    return draw_by_layer([*makers, partial(OutputBlock, width, num_classes)], seed, origin)


def _vgg(
    network: str,
    table: Sequence[int | str],
    in_channels: int,
    num_classes: int,
    image_size: int | Sequence[int],
    dropout: float,
    feat_mult: int,
    seed: int,
) -> list[Block]:
    check_positive(in_channels=in_channels, num_classes=num_classes, feat_mult=feat_mult)
    height, width = sides = sides_of(image_size)
    makers: list[Callable[[], Block]] = []
    channels = in_channels
    for row, following in zip(table, [*table[1:], ""], strict=True):
        if not isinstance(row, int):
            continue
        name, pooled = f"conv{len(makers) + 1}", following == _POOL
        if pooled and min(sides) < 2:
            raise too_small(name, sides, (height, width))
        wide = row * feat_mult
        makers.append(
            partial(
                ConvBlock,
                channels,
                wide,
                name=name,
                pool="max" if pooled else "none",
                dropout=dropout,
                latent_size=latent_side(wide, sides),
                hidden=2048,
                reduced_rank=100,
            )
        )
        channels, sides = wide, (sides[0] // 2, sides[1] // 2) if pooled else sides
    makers.append(partial(_linear, channels * sides[0] * sides[1], _HIDDEN, "linear1", dropout))
    shape = {"in_channels": in_channels, "num_classes": num_classes, "image_size": (height, width), "dropout": dropout}
    origin = Origin(architecture=(network, {**shape, "feat_mult": feat_mult}))
    return draw_by_layer([*makers, partial(OutputBlock, _HIDDEN, num_classes)], seed, origin)


def _linear(in_features: int, width: int, name: str, dropout: float) -> Block:
    return LinearBlock(
        in_features, width, name=name, dropout=dropout, latent_size=width, hidden=width, reduced_rank=min(100, width)
    )
