"""What a rule may need beyond its activations and the labels: the pass, the side channel, and a rule's own views.

Everything here is local: a pass knows one layer and what the layers before it sent. Nothing in it leads to a later one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Carried", "Draw", "LayerPass", "OutputHead", "Views"]


class Carried(NamedTuple):
    """A tensor of the side channel: [rows, *shape] beside the activations of every training micro-batch."""

    shape: tuple[int, ...]
    """Of one row, or of one sample."""
    dtype: torch.dtype = torch.float32
    per_sample: bool = False
    """One entry per sample of the micro-batch, however many rows its views make of it."""


class OutputHead(NamedTuple):
    """The linear map from what an output layer's head reads to its scores."""

    weight: Tensor
    """[V, D], with a graph if it is trained."""
    bias: Tensor | None
    hits: Tensor
    """[] float64: the rule adds how many positions have their target first."""


Draw = Callable[[int], Tensor]
"""`draw(n)`: [B, n] float32 uniform in [0, 1), keyed by (seed, epoch, sample); every call gives the next ones."""


@dataclass(frozen=True)
class Views:
    """How stage 0 makes a rule's rows of the data: `train` (in evaluation `evaluate`) rows of every sample.

    Rows lie view by view: those of view v of B samples are rows v B to (v + 1) B - 1, so `x.chunk(views)` parts them.
    The output layer learns from, and predicts by, the rows of one view.
    """

    train: int = 1
    evaluate: int = 1
    probe: int = 0
    """Which view that is; -1 is the last."""

    def check(self, sample: Tensor, num_classes: int) -> None:
        """Raises: ValueError: no views can be made of samples like this one, [C, H, W] float32 for instance."""

    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        """Training rows [train * B, ...] of samples [B, ...] and labels [B]."""
        raise NotImplementedError

    def make_evaluation(self, samples: Tensor, num_classes: int) -> Tensor:
        """Evaluation rows [evaluate * B, ...] of samples [B, ...]; nothing is drawn, and no label is known."""
        return samples


class LayerPass:
    """One training micro-batch at one layer: what a rule's `carry` and `step` work with.

    Attributes:
        input: the layer's input [rows, ...]; carries no gradient.
        activations: what the block's body makes of it. With its graph unless the rule has `needs_graph = False`.
        labels: [B] int64. rows is B unless the rule has views.
        block: the layer's network, whose `named_parameters()` are its weights.
        step: training micro-batches that the layer has seen before this one, over the whole run.
        epoch: from 0.
        lr_factor: the learning-rate schedule's value, for a rule that changes the weights itself.
        carried: what arrived on the side channel, by name; nothing at the first layer.
        head: of an output layer whose rule `reads_head`: what makes the scores of `activations` [B, T, D]. None: the
            activations are the scores.
    """

    __slots__ = (
        *("_forward", "_generator", "_key", "activations", "block", "carried", "epoch", "head", "input", "labels"),
        *("lr_factor", "step"),
    )

    def __init__(
        self,
        *,
        input: Tensor,
        activations: Tensor,
        labels: Tensor,
        block: nn.Module,
        step: int,
        epoch: int,
        lr_factor: float,
        carried: Mapping[str, Tensor],
        key: int,
        forward: Callable[[Tensor], Tensor],
        head: OutputHead | None = None,
    ) -> None:
        self.input, self.activations, self.labels, self.block = input, activations, labels, block
        self.step, self.epoch, self.lr_factor = step, epoch, lr_factor
        self.carried: Mapping[str, Tensor] = _Arrived(carried)
        self._key, self._forward, self.head = key, forward, head
        self._generator: torch.Generator | None = None

    @property
    def generator(self) -> torch.Generator:
        """Keyed by (seed, layer, step), on the layer's device; one per pass, so draws follow each other."""
        if self._generator is None:
            self._generator = torch.Generator(self.input.device).manual_seed(self._key)
        return self._generator

    def forward(self, x: Tensor) -> Tensor:
        """The block's activations for another input like `input`, with a graph if gradients are on. In training mode: a
        BatchNorm counts it, as it would in any loop that calls the block twice."""
        return self._forward(x)


class _Arrived(Mapping[str, Tensor]):
    """What arrived, with a word on what did not."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            arrived = ", ".join(self._tensors) or "nothing"
            raise ValueError(
                f"no tensor {name!r} arrived on the side channel, only {arrived}: a rule gets what it lists in "
                "`receives`, and the first layer gets nothing (`carried.get`)"
            ) from None

    def get(self, name: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        """What arrived under that name, else `default`."""
        return self._tensors.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
