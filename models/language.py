"""A small language model as a list of blocks: a pre-norm transformer over tokens (Radford et al., GPT-2, 2019)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models.blocks import Block, Origin
from unlocked.models.initialisation import draw_by_layer
from unlocked.models.sizes import check_positive

__all__ = ["generate", "gpt"]

_HEAD = 64


def gpt(
    in_channels: int = 1,
    num_classes: int = 256,
    image_size: int | Sequence[int] = 256,
    dropout: float = 0.0,
    *,
    width: int = 256,
    depth: int = 6,
    local_module_num: int | None = None,
    seed: int = 0,
) -> list[Block]:
    """Token ids [B, T] -> scores [B, T, vocabulary]: an embedding with learned places, `depth` causal layers with heads
    of 64 features and a feed-forward net four times as wide, and a head of its own weights (not the embedding's, which
    belongs to another layer).

    Args:
        num_classes: tokens of the vocabulary.
        image_size: T, the most tokens that it reads at once.
        dropout: probability, before each residual addition.
        width: features of a token: a multiple of 64, or below it one head.
        depth: layers beside the embedding and the output.
        local_module_num: K, 1 to `depth`: the network as K blocks of `depth` / K layers or one more, the first with the
            embedding, the last with the head. None: a block for each layer, for the embedding and for the head.
        in_channels: not used.
        seed: see `unlocked.models.small_conv`.

    Raises:
        ValueError: a size is not positive, a width without whole heads, or more blocks than layers.
    """
    given: Any = image_size
    length = int(given if isinstance(given, Integral) else given[-1])
    check_positive(
        num_classes=num_classes, image_size=length, width=width, depth=depth, local_module_num=local_module_num
    )
    if local_module_num is not None and local_module_num > depth:
        raise ValueError(f"local_module_num is {local_module_num}, but there are {depth} layers; give 1 to {depth}")
    heads = max(1, width // _HEAD)
    if width > _HEAD and width % _HEAD:
        raise ValueError(f"width is {width}, which is no whole number of heads of {_HEAD}; give a multiple of {_HEAD}")
    sizes = {"in_channels": in_channels, "num_classes": num_classes, "image_size": (length,), "dropout": dropout}
    own = {"width": width, "depth": depth, "local_module_num": local_module_num}
    origin = Origin(architecture=("gpt-mini", {**sizes, **own}))

    def layer(number: int) -> Block:
        return Block(f"transformer{number + 1}", _Layer(width, heads, dropout), layout="tokens", hidden=2048)

    makers: list[Callable[[], Block]] = [partial(_first, num_classes, length, width)]
    makers += [partial(layer, number) for number in range(depth)]
    makers.append(partial(_output, width, num_classes))
    if local_module_num is not None:
        cuts = [0, *(1 + depth * k // local_module_num for k in range(1, local_module_num)), len(makers)]
        makers = [partial(_module, k + 1, makers[a:b], b == len(makers)) for k, (a, b) in enumerate(pairwise(cuts))]
    return draw_by_layer(makers, seed, origin)


@torch.no_grad()
def generate(
    module: nn.Module,
    tokens: Tensor,
    count: int,
    *,
    length: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`tokens` [B, t] with `count` more, each drawn from the scores of the one before it: int64 [B, t + count].

    Args:
        module: token ids [B, T] -> scores [B, T, vocabulary], such as `Trainer.module`; runs in eval mode.
        length: the most tokens that it reads at once; of longer sequences it sees the end.
        temperature: 0: the token with the highest score, always.
        generator: of the draws.

    Raises:
        ValueError: no tokens to begin with, or a negative count or temperature.
    """
    if tokens.dim() != 2 or not tokens.shape[1] or count < 0 or temperature < 0:
        raise ValueError(
            f"tokens are {list(tokens.shape)}, count {count} and temperature {temperature}; give [B, t] with t of at "
            "least 1, and neither of the others below 0"
        )
    training = module.training
    module.eval()
    try:
        for _ in range(count):
            scores = module(tokens[:, -length:])[:, -1]
            if temperature:
                chosen = torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)
            else:
                chosen = scores.argmax(1, keepdim=True)
            tokens = torch.cat([tokens, chosen], 1)
    finally:
        module.train(training)
    return tokens


class _Embedding(nn.Module):
    """Token ids [B, t] -> [B, t, width], t at most the number of places; each is told where it stands."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.empty(length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.place, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.place[: ids.shape[1]]
        return x


class _Layer(nn.Module):
    """[B, T, D] -> the same: causal attention, then a feed-forward net, each behind LayerNorm, with its residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop1, self.drop2 = (nn.Dropout(dropout) if dropout else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop1(self._attend(self.norm1(x)))
        y: Tensor = x + self.drop2(self.feed_forward(self.norm2(x)))
        return y

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.inner(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)  # [B, heads, T, D / heads]
        y: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return y


def _first(vocabulary: int, length: int, width: int) -> Block:
    return Block("embedding", _Embedding(vocabulary, length, width), layout="tokens", hidden=2048)


def _output(width: int, vocabulary: int) -> Block:
    parts = OrderedDict(norm=nn.LayerNorm(width), linear=nn.Linear(width, vocabulary))
    return Block("output", nn.Sequential(parts), is_output=True)


def _module(number: int, makers: Sequence[Callable[[], Block]], is_output: bool) -> Block:
    """Blocks as one."""
    body = nn.Sequential(OrderedDict((block.name, block.body) for block in (make() for make in makers)))
    name = f"module{number}"
    return Block(name, body, is_output=True) if is_output else Block(name, body, layout="tokens", hidden=2048)
