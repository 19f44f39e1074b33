"""Networks on the patches of an image: a small vision transformer and an MLP-Mixer, as lists of blocks.

The first layer cuts the image into patches, each projected to a token of `width` features; every further layer maps
tokens [B, T, width] to tokens, its residual connections inside; the last hands its mean token on to the output layer.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unlocked.kernels.images import sides_of
from unlocked.models.blocks import Block, Origin
from unlocked.models.initialisation import draw_by_layer
from unlocked.models.sizes import check_positive

__all__ = ["mlp_mixer", "vit"]


def vit(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    width: int = 192,
    depth: int = 6,
    patch_size: int | None = None,
    seed: int = 0,
) -> list[Block]:
    """A vision transformer (Dosovitskiy et al., ICLR 2021) with the width of ViT-Tiny and half its depth: pre-norm
    layers, heads of 64 features, a feed-forward net four times as wide, GELU, learned places; the mean token is read,
    not a class token.

    Args:
        width: features of a token: a multiple of 64, or below it one head.
        depth: transformer layers, beside the patches and the output.
        patch_size: side of a patch in pixels; default: the largest of 16, 8, 4, 2, 1 that divides both sides of the
            image and leaves at least 49 patches, or 16 of images below 28 x 28: 16 of 224, 8 of 64, 4 of 32, 2 of 8.
        dropout: probability: on attention weights, inside the feed-forward net and before each residual addition.
        in_channels, num_classes, image_size, seed: see `unlocked.models.small_conv`.

    Raises:
        ValueError: a size is not positive, a patch that does not divide the image, or a width without whole heads.
    """
    check_positive(width=width)
    heads = max(1, width // _HEAD)
    if width > _HEAD and width % _HEAD:
        raise ValueError(f"width is {width}, which is no whole number of heads of {_HEAD}; give a multiple of {_HEAD}")

    def layer(name: str, tokens: int, tail: nn.Module | None) -> Block:
        body = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        return Block(name, body, tail, layout="tokens", hidden=2048, reduced_rank=min(100, width))

    sizes = _patches(in_channels, num_classes, image_size, width, depth, patch_size)
    return _network("ViT", "transformer", layer, sizes, dropout, seed=seed)


def mlp_mixer(
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    *,
    width: int = 128,
    depth: int = 8,
    patch_size: int | None = None,
    seed: int = 0,
) -> list[Block]:
    """An MLP-Mixer (Tolstikhin et al., NeurIPS 2021) a quarter as wide as Mixer-S, with its 8 layers and its ratios:
    half the width in the net that mixes tokens, four times the width in the one that mixes features.

    Args:
        dropout: probability, after each of a layer's linear maps.
        width, depth, patch_size: as `vit`; any width is valid.
        in_channels, num_classes, image_size, seed: see `unlocked.models.small_conv`.

    Raises:
        ValueError: a size is not positive, or a patch that does not divide the image.
    """
    check_positive(width=width)

    def layer(name: str, tokens: int, tail: nn.Module | None) -> Block:
        body = _MixerLayer(tokens, width, dropout)
        return Block(name, body, tail, layout="tokens", hidden=2048, reduced_rank=min(100, width))

    sizes = _patches(in_channels, num_classes, image_size, width, depth, patch_size)
    return _network("MLPMixer", "mixer", layer, sizes, dropout, seed=seed)


_HEAD = 64
_FEWEST_PATCHES, _FEWEST_OF_SMALL = 49, 16


class _Sizes(NamedTuple):
    channels: int
    classes: int
    image: tuple[int, int]
    width: int
    depth: int
    patch: int
    tokens: int


def _patches(
    in_channels: int, num_classes: int, image_size: int | Sequence[int], width: int, depth: int, patch_size: int | None
) -> _Sizes:
    check_positive(in_channels=in_channels, num_classes=num_classes, depth=depth, patch_size=patch_size)
    height, breadth = sides_of(image_size)
    fits = [p for p in (16, 8, 4, 2, 1) if not height % p and not breadth % p]
    if patch_size is None:
        least = _FEWEST_PATCHES if height * breadth >= _FEWEST_PATCHES * 4**2 else _FEWEST_OF_SMALL
        patch_size = next((p for p in fits if height * breadth // p**2 >= least), 1)
    if height % patch_size or breadth % patch_size:
        raise ValueError(
            f"patch_size is {patch_size}, which does not divide images of {height} x {breadth} pixels; valid, among "
            f"others: {', '.join(map(str, fits))}"
        )
    tokens = (height // patch_size) * (breadth // patch_size)
    return _Sizes(in_channels, num_classes, (height, breadth), width, depth, patch_size, tokens)


class _Patches(nn.Module):
    """Images [B, C, H, W] -> tokens [B, T, width], row by row; with `place`, each is told where it stands."""

    def __init__(self, sizes: _Sizes, *, place: bool) -> None:
        super().__init__()
        self.project = nn.Conv2d(sizes.channels, sizes.width, sizes.patch, sizes.patch)
        self.place = nn.Parameter(torch.empty(sizes.tokens, sizes.width)) if place else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.place is not None:
            nn.init.normal_(self.place, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.project(images).flatten(2).transpose(1, 2)
        return tokens if self.place is None else tokens + self.place


class _MixerLayer(nn.Module):
    """Tokens mixed, then features, each behind LayerNorm and with its residual connection: [B, T, D] -> [B, T, D]."""

    def __init__(self, tokens: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mix_tokens = _two_maps(tokens, max(1, width // 2), dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mix_features = _two_maps(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.mix_features(self.norm2(x))
        return y


class _MeanToken(nn.Module):
    """[B, T, D] -> [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _two_maps(width: int, hidden: int, dropout: float) -> nn.Module:
    parts = [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)]
    return nn.Sequential(*(part for part in parts if dropout or not isinstance(part, nn.Dropout)))


def _network(
    network: str,
    kind: str,
    layer: Callable[[str, int, nn.Module | None], Block],
    sizes: _Sizes,
    dropout: float,
    *,
    seed: int,
) -> list[Block]:
    shape = {"in_channels": sizes.channels, "num_classes": sizes.classes, "image_size": sizes.image, "dropout": dropout}
    own = {"width": sizes.width, "depth": sizes.depth, "patch_size": sizes.patch}
    origin = Origin(architecture=(network, {**shape, **own}))
    makers: list[Callable[[], Block]] = [partial(_first, sizes, network == "ViT")]
    makers += [
        partial(layer, f"{kind}{i + 1}", sizes.tokens, _MeanToken() if i + 1 == sizes.depth else None)
        for i in range(sizes.depth)
    ]
    return draw_by_layer([*makers, partial(_output, sizes)], seed, origin)


def _first(sizes: _Sizes, place: bool) -> Block:
    return Block(
        "patches", _Patches(sizes, place=place), layout="tokens", hidden=2048, reduced_rank=min(100, sizes.width)
    )


def _output(sizes: _Sizes) -> Block:
    parts = OrderedDict(norm=nn.LayerNorm(sizes.width), linear=nn.Linear(sizes.width, sizes.classes))
    return Block("output", nn.Sequential(parts), is_output=True)
