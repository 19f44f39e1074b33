"""Blocks as valid as others, whose sizes, strides or spelling are unusual: each of them was computed wrongly once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from block_modules import Channels
from torch import Tensor, nn

__all__ = ["AWKWARD"]

Case = tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, ...], bool]
"""As of `grouped_blocks`."""

attend = nn.functional.scaled_dot_product_attention


class Asking(nn.Module):
    """Learned queries of what arrives; or, `asked`, learned keys and values, which that reads.

    Args:
        shape: of what is learned, before its six tokens.
        heads: of what arrives, [B, heads, T, d]; 0: it is [B, T, d].
    """

    def __init__(self, width: int, *shape: int, heads: int, asked: bool = False, expanded: bool = False) -> None:
        super().__init__()
        self.map, self.out = nn.Linear(width, width), nn.Linear(width, width)
        learned = [nn.Parameter(torch.randn(*shape, 6, width // max(heads, 1))) for _ in range(1 + asked)]
        self.learned, self.heads, self.asked, self.expanded = nn.ParameterList(learned), heads, asked, expanded

    def forward(self, x: Tensor) -> Tensor:
        y = self.map(x)
        y = y.unflatten(-1, (self.heads, -1)).transpose(1, 2) if self.heads else y
        learned = [one.expand(x.shape[0], -1, -1, -1) if self.expanded else one for one in self.learned]
        y = attend(y, *learned) if self.asked else attend(*learned, y, torch.tanh(y))
        result: Tensor = self.out(y.transpose(1, 2).flatten(2) if self.heads else y)
        return result


class OneQueryHead(nn.Module):
    """Two heads of keys and values that one head of queries reads, all of one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map, self.out = nn.Linear(width, 5 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.map(x).view(batch, tokens, 5, width).transpose(1, 2).split([1, 2, 2], 1)
        result: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return result


class Spelt(nn.Module):
    """What comes between two maps, as someone spells it."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(15, 15), middle, nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.middle(self.first(x)))
        return result


class Across(nn.Module):
    """A large product with a bias that is one column of two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.biases = nn.Parameter(0.1 * torch.randn(96, 128)), nn.Parameter(torch.randn(96, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.biases.unbind(1)[0])


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "in a tuple": lambda y: torch.reshape(y, (y.shape[0], -1)),
    "in a list": lambda y: y.view([y.size(0), -1]),
    "by name": lambda y: y.reshape(shape=(y.size(0), -1)),
    "of a dimension": lambda y: y.unflatten(-1, (3, y.shape[2] // 3)).flatten(1),
    "summed": lambda y: y.view(y.shape[:1] + (y.shape[1] * 15,)),  # noqa: RUF005 - a proxy is not iterable
    "of a slice": lambda y: y.reshape(y.shape[: y.dim() - 2] + (-1,)),  # noqa: RUF005
}

TOKENS = {"layout": "tokens"}
AWKWARD: dict[str, Case] = {
    # Attention whose rows are not dense, or whose samples or heads are broadcast; few tokens are the library's.
    "attention between few channels": (partial(Channels, 16, apart=False), TOKENS, (7, 16), True),
    "attention between few channels, apart": (partial(Channels, 16, apart=True), TOKENS, (7, 16), False),
    "learned queries of heads": (partial(Asking, 16, 1, 2, heads=2), TOKENS, (16, 16), False),
    "a head of learned queries": (partial(Asking, 16, 1, 1, heads=2), TOKENS, (40, 16), False),
    "learned queries of rows": (partial(Asking, 16, 1, heads=0), TOKENS, (16, 16), False),
    "learned keys": (partial(Asking, 16, 1, 1, heads=2, asked=True), TOKENS, (16, 16), False),
    "learned keys of all samples": (partial(Asking, 16, 2, heads=2, asked=True), TOKENS, (16, 16), False),
    "one head of queries": (partial(OneQueryHead, 16), TOKENS, (12, 16), True),
    "one head of queries, many tokens": (partial(OneQueryHead, 16), TOKENS, (40, 16), True),
    "a bias across": (Across, TOKENS, (64, 128), False),
    # Sizes that are asked for, inside of other arguments.
    **{
        f"a shape {name}": (partial(Spelt, spelt, 90), {"latent_size": 8}, (6, 15), False)
        for name, spelt in SHAPES.items()
    },
}
"""By name, as the cases of `graph_blocks`."""
