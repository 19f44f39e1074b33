"""What a layer asks of the way its local step is computed."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

__all__ = ["Step"]


class Step(Protocol):
    """One way to compute a layer's local step."""

    counts: Sequence[nn.Module]
    """The BatchNorms that don't count their batches by themselves."""

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """Training-mode forward; keeps what `update` needs. Returns the next layer's input, in `out` if given."""
        ...

    def update(self, labels: Tensor) -> Tensor:
        """The local update for the activations that `forward` kept, by the targets [B, ...]. Adds the loss (and, for
        the output layer, the hits) to the layer's totals. Returns the sum of the rows' losses, on the device."""
        ...
