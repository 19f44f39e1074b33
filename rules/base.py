"""What a layer minimises: the interface between a layer and its local rule.

A rule of one's own is a `LocalRule` with a `forward(activations, labels) -> loss`, and nothing else if it needs nothing
else; hand its class (or any callable that takes a `LayerInfo`) to `Trainer(rule=...)`:

    class Prototype(LocalRule):
        def __init__(self, layer: LayerInfo) -> None:
            super().__init__(layer)
            self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))

        def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
            return -torch.cdist(activations.flatten(1), self.centres).log_softmax(1).gather(1, labels[:, None]).mean()
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.kernels.reference import HeadResult, Layout

__all__ = ["CrossEntropy", "HeadArguments", "LayerInfo", "LocalRule", "Rule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """What a rule may know of the layer it is built for."""

    name: str
    index: int
    """Place in the network, from 0."""
    activation_shape: tuple[int, ...]
    """Shape of one sample's activations: (C, H, W), (C, L), (T, D) or (D,)."""
    num_classes: int
    latent_size: int
    """p, the side of the latents' pooling; for (C, L), (T, D) the pieces of L or T, for (D,) the number of latents."""
    hidden: int
    """Width of the random feedback R of the `*_Random` rules and LocalLosses."""
    reduced_rank: int
    """Rows r of LLS_MxM_reduced's basis."""
    seed: int
    layout: Layout | None = None
    """Of two-dimensional activations: "channels_first" (C, L) or "tokens" (T, D). None: nobody knows."""

    @property
    def num_features(self) -> int:
        """Activations of one sample, flattened."""
        return prod(self.activation_shape)

    @property
    def num_latents(self) -> int:
        """Latents of one sample as `pool_latents` makes them: C p p of (C, H, W), C p of (C, L), D p of (T, D), p of
        (D,).

        Raises:
            ValueError: activations that have none, or whose layout is not known; says how to declare it.
        """
        shape, p = self.activation_shape, self.latent_size
        if len(shape) == 2 and self.layout is None:
            raise ValueError(
                f"nothing tells whether its activations {shape} are (C, L), channels first as a 1-d convolution gives "
                'them, or (T, D), tokens; say so with Block(..., layout="channels_first") or layout="tokens", or '
                "Block.wrap(module, name, layout=...)"
            )
        if len(shape) > 3:
            raise ValueError(f"latents are made of (C, H, W), (C, L), (T, D) or (D,), not of {shape}")
        return (
            p
            if len(shape) == 1
            else shape[-1 if self.layout == "tokens" and len(shape) == 2 else 0] * p ** (len(shape) - 1)
        )

    def generator(self) -> torch.Generator:
        """A fresh CPU generator keyed by (seed, layer): the only source of a rule's initial values."""
        return torch.Generator().manual_seed(philox_int(self.seed, Purpose.RULE, self.index))


class HeadArguments(NamedTuple):
    """What `kernels.local_head` needs from a rule that has the closed form of design section 5."""

    basis: Tensor | None
    modulation: Tensor | None
    normalize: bool
    temperature: float
    label_smoothing: float
    basis_gradient: bool


class LocalRule(nn.Module):
    """Turns one layer's activations and the labels into a loss. Owns its parameters; its optimizer is the layer's."""

    def __init__(self, layer: "LayerInfo | None" = None) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the batch, a scalar that autograd can follow.

        Args:
            activations: [B, C, H, W], [B, C, L], [B, T, D] or [B, D], the block's output before any pooling.
            labels: [B], int64.
        """
        raise NotImplementedError

    def head_arguments(self) -> HeadArguments | None:
        """The closed form's inputs, or None: the layer then trains through autograd."""
        return None

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        """The gradients of this rule's trained parameters, in the order of `parameters()`, from the closed form."""
        raise NotImplementedError


Rule = Callable[[LayerInfo], LocalRule]
"""Builds the rule of one layer: a `LocalRule` class, or a configured one such as `LLS(temperature=0.5)`."""


class CrossEntropy(LocalRule):
    """Plain cross-entropy of logits [B, N]: what the output layer trains on (temperature 1, no label smoothing)."""

    def __init__(self, layer: LayerInfo | None = None) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(activations, labels)

    def head_arguments(self) -> HeadArguments:
        return HeadArguments(None, None, False, 1.0, 0.0, False)

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        return []
