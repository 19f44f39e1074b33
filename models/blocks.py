"""Blocks: what one layer computes, split where its local rule looks.

A block is `tail(body(x))`. The body ends in the activations that the local rule sees; the tail (pooling, dropout)
has no parameters and makes of them what the next layer reads. Pooling belongs to the block before it, so that
less has to be sent to the next layer. A block also carries what the authors' table says about its local head:
the latents' size, the width of the random feedback, the rows of the reduced basis.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn

from unlocked.kernels.reference import Layout
from unlocked.models.dropout import KeyedDropout, replace_dropout

__all__ = [
    "Block",
    "ConvBlock",
    "DepthwiseBlock",
    "LinearBlock",
    "Origin",
    "OutputBlock",
    "Pool",
    "use_average_pools",
    "use_tanh",
]

NEGATIVE_SLOPE = 0.01  # torch's default for LeakyReLU, and the authors'
Pool = Literal["none", "max", "mean", "average"]


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """Where a block comes from: one part of a whole."""

    module: nn.Module | None = None
    """The network that was cut, whose weights the block shares."""
    architecture: tuple[str, Mapping[str, Any]] | None = None
    """A network of this project: its name, and what it was made with."""


class Block(nn.Module):
    """One layer of a network. Dropout modules inside `body` and `tail` are replaced by keyed ones.

    Args:
        name: unique among the blocks of a network; in summaries, snapshots and errors.
        body: input -> activations [B, C, H, W], [B, C, L], [B, T, D] or [B, D] that the local rule sees. Owns all
            parameters.
        tail: activations -> what the next layer reads. No parameters. None: the activations themselves.
        latent_size: side p of the latents' pooling; for activations [B, D] the number of latents.
        hidden: width of R in the *_Random rules and LocalLosses.
        reduced_rank: rows r of the basis in LLS_MxM_reduced.
        is_output: the activations are the class scores and train on plain cross-entropy.
        layout: what activations [B, X, Y] are: "channels_first" [B, C, L], as 1-d convolutions give them, or "tokens"
            [B, T, D]. None: as the operations that make them tell.

    Raises:
        ValueError: an empty name, a size below 1, an unknown layout, or parameters in the tail.
    """

    def __init__(
        self,
        name: str,
        body: nn.Module,
        tail: nn.Module | None = None,
        *,
        latent_size: int | None = None,
        hidden: int | None = None,
        reduced_rank: int | None = None,
        is_output: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        if not name:
            raise ValueError("a block needs a name, such as 'conv1'; got an empty string")
        for word, size in {"latent_size": latent_size, "hidden": hidden, "reduced_rank": reduced_rank}.items():
            if size is not None and size < 1:
                raise ValueError(f"block {name}: {word} is a positive integer or None, got {size}")
        if layout not in (None, *get_args(Layout)):
            raise ValueError(f"block {name}: layout {layout!r} is not known; valid: {', '.join(get_args(Layout))}")
        tail = nn.Identity() if tail is None else tail
        if found := [key for key, _ in tail.named_parameters()]:
            raise ValueError(
                f"block {name}: the tail has no parameters, got {', '.join(found)}; they belong in the body"
            )
        self.name = name
        self.body = body
        self.tail = tail
        self.latent_size = latent_size
        self.hidden = hidden
        self.reduced_rank = reduced_rank
        self.is_output = is_output
        self.layout: Layout | None = layout
        self._tail_writes: dict[bool, bool] = {}  # in training or not, as far as it was tried
        self.origin = Origin()
        self.start_key: tuple[int, int] | None = None
        """(seed, layer) that a network of the project drew the weights by; None: they are whoever's built the block."""
        replace_dropout(self)

    @staticmethod
    def wrap(
        module: nn.Module,
        name: str,
        *,
        latent_size: int | None = None,
        hidden: int | None = None,
        reduced_rank: int | None = None,
        is_output: bool = False,
        layout: Layout | None = None,
    ) -> "Block":
        """A block of any module: its output is both what the rule sees and what the next layer reads."""
        return Block(
            name,
            module,
            latent_size=latent_size,
            hidden=hidden,
            reduced_rank=reduced_rank,
            is_output=is_output,
            layout=layout,
        )

    def forward(self, x: Tensor, **beside: Tensor) -> Tensor:
        """The tail of the body; `beside`: tensors that the body's forward takes by name, such as a mask."""
        return cast(Tensor, self.tail(self.body(x, **beside)))

    def finish(self, activations: Tensor) -> Tensor:
        """The tail of activations that a rule is still to see: one that writes into what it is given has a copy.

        Whether it does only a trial tells, whatever its forward() holds: the first time, in training and in evaluation.
        """
        writes = self._tail_writes.get(self.training)
        if writes is False:
            return cast(Tensor, self.tail(activations))
        copied = activations.clone()
        version = copied._version
        result = cast(Tensor, self.tail(copied))
        self._tail_writes[self.training] = writes or copied._version != version
        return result

    def copy(self) -> "Block":
        """A block of its own, without the network that this one was cut from, which a deepcopy would copy as well."""
        return copy.deepcopy(self, {id(self.origin): Origin()})

    def _part(self, name: str) -> nn.Module:
        return self.body.get_submodule(name)


class ConvBlock(Block):
    """Conv2d -> BatchNorm2d -> LeakyReLU, then pooling and dropout.

    Args:
        pool: what follows the activations: "none", "max" or "mean" (2x2, stride 2, odd rows dropped) or
            "average" (adaptive).
        pool_size: the side that "average" pools to (default 1). "max" and "mean" have 2 and "none" 1.
        dropout: probability, after the pool.
        latent_size, hidden, reduced_rank: see `Block`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        name: str = "conv",
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
        pool: Pool = "none",
        pool_size: int | None = None,
        dropout: float = 0.0,
        latent_size: int | None = None,
        hidden: int | None = None,
        reduced_rank: int | None = None,
    ) -> None:
        body = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias),
                norm=nn.BatchNorm2d(out_channels),
                act=nn.LeakyReLU(NEGATIVE_SLOPE),
            )
        )
        side = _pool_side(name, pool, pool_size)
        tail = _tail(pool, side, dropout)
        super().__init__(name, body, tail, latent_size=latent_size, hidden=hidden, reduced_rank=reduced_rank)
        self.pool: Pool = pool
        self.pool_size = side
        self.dropout = dropout
        self.negative_slope = NEGATIVE_SLOPE

    @property
    def conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self._part("conv"))

    @property
    def norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self._part("norm"))


class DepthwiseBlock(Block):
    """Depthwise 3x3 -> BatchNorm2d -> LeakyReLU -> pointwise 1x1 -> BatchNorm2d -> LeakyReLU, without biases.

    The authors pad the depthwise convolution by its stride, which is 2 where the stride is 2 and adds a border of
    zeros that no other MobileNet has; `same_padding=True` pads by 1 throughout. See `ConvBlock` for the rest.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        name: str = "depthwise",
        stride: int = 1,
        same_padding: bool = False,
        pool: Pool = "none",
        pool_size: int | None = None,
        dropout: float = 0.0,
        latent_size: int | None = None,
        hidden: int | None = None,
        reduced_rank: int | None = None,
    ) -> None:
        padding = 1 if same_padding else stride
        body = nn.Sequential(
            OrderedDict(
                depthwise=nn.Conv2d(in_channels, in_channels, 3, stride, padding, groups=in_channels, bias=False),
                norm1=nn.BatchNorm2d(in_channels),
                act1=nn.LeakyReLU(NEGATIVE_SLOPE),
                pointwise=nn.Conv2d(in_channels, out_channels, 1, bias=False),
                norm2=nn.BatchNorm2d(out_channels),
                act2=nn.LeakyReLU(NEGATIVE_SLOPE),
            )
        )
        side = _pool_side(name, pool, pool_size)
        tail = _tail(pool, side, dropout)
        super().__init__(name, body, tail, latent_size=latent_size, hidden=hidden, reduced_rank=reduced_rank)
        self.pool: Pool = pool
        self.pool_size = side
        self.dropout = dropout
        self.negative_slope = NEGATIVE_SLOPE

    @property
    def depthwise(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self._part("depthwise"))

    @property
    def norm1(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self._part("norm1"))

    @property
    def pointwise(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self._part("pointwise"))

    @property
    def norm2(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self._part("norm2"))


class LinearBlock(Block):
    """Flatten -> Linear -> BatchNorm1d -> LeakyReLU, then dropout.

    The input is [B, D], or [B, C, h, w] flattened in the logical order C, h, w whatever its memory format.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str = "linear",
        dropout: float = 0.0,
        latent_size: int | None = None,
        hidden: int | None = None,
        reduced_rank: int | None = None,
    ) -> None:
        body = nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                linear=nn.Linear(in_features, out_features),
                norm=nn.BatchNorm1d(out_features),
                act=nn.LeakyReLU(NEGATIVE_SLOPE),
            )
        )
        tail = _tail("none", 1, dropout)
        super().__init__(name, body, tail, latent_size=latent_size, hidden=hidden, reduced_rank=reduced_rank)
        self.pool: Pool = "none"
        self.pool_size = 1
        self.dropout = dropout
        self.negative_slope = NEGATIVE_SLOPE

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self._part("linear"))

    @property
    def norm(self) -> nn.BatchNorm1d:
        return cast(nn.BatchNorm1d, self._part("norm"))


class OutputBlock(Block):
    """Flatten -> Linear to the class scores [B, num_classes]."""

    def __init__(self, in_features: int, num_classes: int, *, name: str = "output") -> None:
        body = nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(in_features, num_classes)))
        super().__init__(name, body, is_output=True)

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self._part("linear"))


def _pool_side(name: str, pool: str, pool_size: int | None) -> int:
    fixed = {"none": 1, "max": 2, "mean": 2}
    if pool not in (*fixed, "average"):
        raise ValueError(f"block {name}: pool {pool!r} is not known; valid: {', '.join(get_args(Pool))}")
    size = fixed.get(pool, 1) if pool_size is None else pool_size
    if size < 1 or size != fixed.get(pool, size):
        valid = "a positive side" if pool == "average" else str(fixed[pool])
        raise ValueError(f"block {name}: pool_size {size} does not go with pool {pool!r}; valid: {valid}")
    return size


def _tail(pool: str, pool_size: int, dropout: float) -> nn.Module:
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    if pool == "max":
        steps["pool"] = nn.MaxPool2d(pool_size)
    elif pool == "mean":
        steps["pool"] = nn.AvgPool2d(pool_size)
    elif pool == "average":
        steps["pool"] = nn.AdaptiveAvgPool2d(pool_size)
    if dropout:
        steps["dropout"] = KeyedDropout(dropout)
    return nn.Sequential(steps) if steps else nn.Identity()


def use_tanh(blocks: Iterable[Block]) -> None:
    """Puts tanh in the place of the LeakyReLU that ends a convolutional or linear block, in place."""
    for block in blocks:
        if isinstance(block, ConvBlock | LinearBlock):
            block.body.add_module("act", nn.Tanh())


def use_average_pools(blocks: Iterable[Block]) -> None:
    """Puts 2x2 average pools in the place of the 2x2 max pools between the blocks, in place.

    Raises:
        ValueError: there are none.
    """
    pooled = [b for b in blocks if isinstance(b, ConvBlock | DepthwiseBlock) and b.pool == "max"]
    if not pooled:
        raise ValueError("the network has no max pools between its blocks; leave --pool AVG out")
    for block in pooled:
        block.pool = "mean"
        cast(nn.Sequential, block.tail).pool = nn.AvgPool2d(2)
