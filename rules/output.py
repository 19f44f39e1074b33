"""What the output layer may train on instead of cross-entropy: `Trainer(output_rule=...)`, --output-loss NAME."""

import torch.nn.functional as F
from torch import Tensor

from unlocked.rules.base import CrossEntropy, LocalRule, Rule

__all__ = ["OUTPUT_RULES", "Margin", "SquaredError"]


class SquaredError(LocalRule):
    """The mean square of logits [B, n] minus one-hot labels."""

    takes = ("classification",)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(activations, F.one_hot(labels, activations.shape[1]).to(activations.dtype))


class Margin(LocalRule):
    """The multi-class hinge loss (Crammer and Singer, JMLR 2001): a sample's own logit shall be larger than the largest
    other one by 1; the mean of what is missing."""

    takes = ("classification",)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        own = activations.gather(1, labels[:, None])
        other = activations.scatter(1, labels[:, None], float("-inf")).amax(1, keepdim=True)
        return (1 + other - own).clamp_min(0).mean()


OUTPUT_RULES: dict[str, Rule] = {"cross-entropy": CrossEntropy, "squared-error": SquaredError, "margin": Margin}
"""By the names of --output-loss."""
