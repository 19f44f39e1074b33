"""What only a trial of a model's blocks tells: what each draws from, and which of its inputs it writes into."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from unlocked.models import Block
from unlocked.models.chance import find_draws
from unlocked.models.overwriting import Writes, find_writes
from unlocked.runtime.named_inputs import rows_of

__all__ = ["made_up", "try_blocks"]


def try_blocks(
    blocks: Sequence[Block],
    sample: Tensor,
    outputs: Sequence[tuple[int, ...]],
    beside: Mapping[str, Tensor],
    needs: Sequence[Sequence[str]],
    seed: int,
) -> tuple[list[frozenset[str]], list[Writes]]:
    """Of each block what it draws from and what it writes into, tried with made-up inputs.

    Args:
        sample: one sample's input.
        outputs: one sample's output of each block.
        beside: one row [1, ...] of each named tensor of the data.
        needs: of each block, the names of those that it reads.

    Raises:
        ValueError: chance that no key reaches; names layer and module.
    """
    draws, writes = [], []
    inputs = chain([sample], map(torch.zeros, outputs[:-1]))  # one at a time
    for block, like, names in zip(blocks, inputs, needs, strict=True):
        made, named = partial(made_up, like, seed), rows_of(beside, names, 2)
        draws.append(find_draws(block, made, named))
        writes.append(find_writes(block, made, named))
    return draws, writes


def made_up(sample: Tensor, seed: int) -> Tensor:
    """A micro-batch of two samples like this one: tokens as they are, anything else normally distributed."""
    shape = (2, *sample.shape)
    if not sample.is_floating_point():
        return sample.expand(shape).clone()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed & 0x7FFFFFFF))
