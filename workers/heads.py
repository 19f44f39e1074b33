"""The local step of an output layer over a vocabulary: its scores [B, T, V] are never whole, in training or evaluation
."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unlocked.kernels.vocabulary import linear_cross_entropy, pieces, using
from unlocked.models import Block
from unlocked.rules import Tokens
from unlocked.workers.fused import FusedSteps
from unlocked.workers.graph.body import GraphBody
from unlocked.workers.layer import AutogradStep, Layer, Step, StepFactory
from unlocked.workers.open_step import OpenStep, opened_body

__all__ = ["PiecewiseHead", "PiecewiseStep", "SplitBody", "head_of", "piecewise_step", "split_body"]


class SplitBody(NamedTuple):
    """A body as what comes before its scores, and the linear layer that makes them."""

    hidden: Callable[..., Tensor]
    """(x, named tensors) -> [B, T, D]"""
    head: nn.Linear


def split_body(block: Block) -> SplitBody | None:
    """None: the block does not tell where its scores are made.

    A body tells by a `head` and a method `hidden`, or by being an nn.Sequential that ends in an nn.Linear, or in
    another body (or a `Block` without a tail) that tells.
    """
    if list(block.tail.children()) or not isinstance(block.tail, nn.Identity):
        return None
    return _split(block.body)


def head_of(block: Block) -> nn.Linear | None:
    """The linear layer that makes the scores of what comes before it; None: the block does not tell."""
    found = split_body(block)
    return None if found is None else found.head


def _split(body: nn.Module) -> SplitBody | None:
    if isinstance(body, Block):
        return split_body(body)
    hidden, head = getattr(body, "hidden", None), getattr(body, "head", None)
    if callable(hidden) and type(head) is nn.Linear:
        return SplitBody(cast(Callable[..., Tensor], hidden), head)
    if type(body) is not nn.Sequential or not len(body):
        return None
    before, last = body[:-1], body[-1]
    if type(last) is nn.Linear:
        return SplitBody(before, last)
    inner = _split(last)
    return inner and SplitBody(lambda x: inner.hidden(before(x)), inner.head)


def piecewise_step(other: StepFactory | None) -> StepFactory:
    """Builds such steps; `other` may put a faster optimizer in the place of the layer's."""

    def build(layer: Layer) -> Step:
        if not isinstance(other, FusedSteps):
            if other is not None:
                other(layer)
            return PiecewiseStep(layer)
        layer.optimizer = other.optimizer_of(layer)
        before = cast(SplitBody, split_body(layer.block)).hidden
        body, why = None, "what its head reads is no module's result"
        if isinstance(before, nn.Module) and not layer.needs:
            body, why = opened_body(layer, other.backend, before)
        if body is not None:
            return OpenPiecewiseStep(layer, body)
        step = PiecewiseStep(layer)
        step.why = why
        return step

    return build


class PiecewiseHead:
    """What steps over a vocabulary have in common: the block's linear head, apart from what it reads."""

    layer: Layer
    split: SplitBody

    @property
    def head(self) -> nn.Linear:
        """What makes the scores."""
        return self.split.head

    def hidden(self, x: Tensor) -> Tensor:
        """[B, T, D]: what the head reads."""
        return self.split.hidden(self.layer.own(x), **self.layer.beside)

    @torch.no_grad()
    def tally(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The task's sums for what `hidden` gave [B, T, D] and targets [B, T]."""
        rows, targets = hidden.flatten(0, 1), labels.flatten()
        total = torch.zeros_like(self.layer.totals)
        for part in pieces(len(rows), self.head.out_features):
            total += self.layer.task.tally(self.head(rows[part]), targets[part])
        return total

    def account(self, loss: Tensor, hits: Tensor, labels: Tensor) -> Tensor:
        """Adds a training micro-batch with that mean loss and so many hits to the layer's totals; the sum of losses."""
        count = self.layer.task.count(labels)
        loss_sum = loss.double() * count
        self.layer.totals += torch.stack([loss_sum, count, hits])
        return loss_sum


class PiecewiseStep(PiecewiseHead, AutogradStep):
    """Cross-entropy of a linear head in pieces, with its backward; what comes before the head goes through autograd."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.task = cast(Tokens, layer.task)
        self.split = cast(SplitBody, split_body(layer.block))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What the head reads, in the place of the scores: nobody asks for those of a training micro-batch."""
        with torch.enable_grad(), self.layer.autocast(), self.layer.group_norms.active():
            self._activations = self.hidden(x.detach())
        return self._activations.detach()

    def update(self, labels: Tensor) -> Tensor:
        layer, activations, head = self.layer, self.take_activations(), self.head
        hits = torch.zeros((), dtype=torch.float64, device=layer.device)
        with torch.enable_grad(), using(layer.kernels):
            loss = linear_cross_entropy(
                activations.flatten(0, 1),
                head.weight,
                labels.flatten(),
                bias=head.bias,
                ignore_index=self.task.ignore_index,
                hits=hits,
            )
        self.descend(loss)
        with torch.no_grad():
            return self.account(loss.detach(), hits, labels)


class OpenPiecewiseStep(OpenStep, PiecewiseStep):
    """The same with what comes before the head in closed form."""

    def __init__(self, layer: Layer, body: GraphBody) -> None:
        super().__init__(layer, body)
        self.rest = "its scores are made in pieces"
