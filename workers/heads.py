"""The local step of an output layer over a vocabulary: its scores [B, T, V] are never whole, in training or evaluation
."""

from typing import cast

import torch
from torch import Tensor, nn

from unlocked.kernels.vocabulary import linear_cross_entropy, pieces, using
from unlocked.models import Block
from unlocked.rules import Tokens
from unlocked.workers.layer import AutogradStep, Layer, Step, StepFactory

__all__ = ["PiecewiseHead", "PiecewiseStep", "head_of", "piecewise_step"]


def head_of(block: Block) -> nn.Linear | None:
    """The linear layer that makes the scores of what `hidden` gives; None: the block does not tell.

    A body tells by a `head` and a method `hidden`, or by being an nn.Sequential that ends in an nn.Linear.
    """
    if list(block.tail.children()) or not isinstance(block.tail, nn.Identity):
        return None
    body = block.body
    found = getattr(body, "head", None) if callable(getattr(body, "hidden", None)) else None
    if found is None and type(body) is nn.Sequential and len(body):
        found = body[-1]
    return found if type(found) is nn.Linear else None


def piecewise_step(other: StepFactory | None) -> StepFactory:
    """Builds such steps; `other` may put a faster optimizer in the place of the layer's."""

    def build(layer: Layer) -> Step:
        if other is not None:
            other(layer)
        return PiecewiseStep(layer)

    return build


class PiecewiseHead:
    """What steps over a vocabulary have in common: the block's linear head, apart from what it reads."""

    layer: Layer
    head: nn.Linear

    def hidden(self, x: Tensor) -> Tensor:
        """[B, T, D]: what the head reads."""
        body = self.layer.block.body
        if isinstance(body, nn.Sequential):
            inner: Tensor = body[:-1](x)
            return inner
        found: Tensor = body.hidden(x, **self.layer.beside)  # type: ignore[operator]
        return found

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
        self.head = cast(nn.Linear, head_of(layer.block))

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What the head reads, in the place of the scores: nobody asks for those of a training micro-batch."""
        with torch.enable_grad(), self.layer.autocast():
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
        if layer.optimizer is not None:
            layer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            layer.optimizer.step()
        with torch.no_grad():
            return self.account(loss.detach(), hits, labels)
