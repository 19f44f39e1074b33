"""DFA: direct feedback alignment (Nokland, "Direct feedback alignment provides learning in deep neural networks",
NeurIPS 2016), for comparison. Every layer waits for the output's error, so it is not local and can't be a pipeline.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models import Block
from unlocked.rules import LayerInfo
from unlocked.rules.drtp import random_projection
from unlocked.runtime.network import Network, backpropagation_network

__all__ = ["feedback_alignment_network", "whole_network"]


def whole_network(rule: str, network: Network) -> Network:
    """The network as one layer, which learns by the global rule "BP" or "DFA"."""
    return {"BP": backpropagation_network, "DFA": feedback_alignment_network}[rule](network)


def feedback_alignment_network(network: Network) -> Network:
    """The same model as one layer whose hidden blocks learn from projections of the output's error.

    Block k's gradient at its activations [B, ...] is e B_k, where e [B, num_classes] is the loss's gradient at the
    logits and B_k the fixed random matrix of `unlocked.rules.drtp` (the one that DRTP projects the labels with).
    """
    if network.task.name != "classification" or any(network.needs):
        raise ValueError(
            f"DFA is for classification of samples of one tensor; the task is {network.task.name}: give a local rule, "
            "or BP"
        )
    whole = backpropagation_network(network)
    names = [block.name for block in network.blocks]
    blocks: OrderedDict[str, nn.Module] = OrderedDict(zip(names, network.blocks, strict=True))
    body = _DirectFeedback(blocks, network.infos[:-1], _written_after(network))
    return replace(whole, blocks=[Block(whole.blocks[0].name, body, is_output=True)])


def _written_after(network: Network) -> list[bool]:
    return [one.activations or after.input for one, after in pairwise(network.writes)]


class _DirectFeedback(nn.Sequential):
    """Blocks in a row, between which no gradient flows.

    Args:
        copied: for every hidden block, whether the activations are written into by what comes after them.
    """

    def __init__(
        self, blocks: "OrderedDict[str, nn.Module]", hidden: Sequence[LayerInfo], copied: Sequence[bool]
    ) -> None:
        super().__init__(blocks)
        self._copied = copied
        for k, info in enumerate(hidden):
            self.register_buffer(f"projection{k}", random_projection(info), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, output = self
        assert isinstance(output, Block)
        pairs: list[Tensor] = []
        for k, block in enumerate(hidden):
            assert isinstance(block, Block)
            activations = block.body(x)
            pairs += [activations, self.get_buffer(f"projection{k}")]
            handed = activations.detach()
            x = block.tail(handed.clone() if self._copied[k] else handed)
        logits: Tensor = _ProjectError.apply(output(x), *pairs)
        return logits


class _ProjectError(torch.autograd.Function):
    """Hands the logits on; on the way back, hands their gradient to all activations, projected."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        ctx.shapes = [activations.shape for activations in pairs[::2]]
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (error,) = grads
        found: list[Tensor | None] = []
        for projection, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True):
            found += [(error @ projection).view(shape), None]
        return error, *found
