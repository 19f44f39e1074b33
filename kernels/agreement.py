"""Cross-entropy together with agreement between two layers' scores, in pieces: [N, V] is never whole in memory.

Both layers' scores are made of latents by one weight, so that what travels from the layer before are its latents and
not its scores, which are larger by V / D. The gradient at a piece's scores is known as soon as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_agreement", "scores_agreement"]

_PIECE = 1 << 20
"""Scores of a piece: 4 MiB of float32, the fastest of 0.5 to 16 on a CPU."""


def linear_agreement(
    latents: Tensor,
    before: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float,
    ignore_index: int = -100,
) -> Tensor:
    """alpha CE(p, y) + (1 - alpha) KL(p || q), mean over the rows that count (0 where none does), where p are the
    probabilities of the scores latents weightT + bias and q those of before weightT + bias.

    Only the latents get a gradient: KL's at the scores is p (log p - log q - KL).

    Args:
        latents, before: [N, D] float32.
        weight: [V, D] float32, and bias [V] or None.
        targets: [N] int64 in [0, V), or `ignore_index` where a row does not count.
    """
    found: Tensor = _Agreement.apply(latents, before, weight, bias, targets, alpha, ignore_index, True)
    return found


def scores_agreement(
    scores: Tensor,
    before: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float,
    ignore_index: int = -100,
) -> Tensor:
    """The same for scores [N, V] that are there already; these get the gradient."""
    found: Tensor = _Agreement.apply(scores, before, weight, bias, targets, alpha, ignore_index, False)
    return found


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        own: Tensor,
        before: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        alpha: float,
        ignore_index: int,
        projects: bool,
    ) -> Tensor:
        counts = targets != ignore_index
        number = counts.sum().clamp_min(1)
        share = counts.to(own.dtype) / number
        known = targets.where(counts, 0)[:, None]
        total = own.new_zeros((), dtype=torch.float64)
        at_own = torch.empty_like(own)
        size = max(1, _PIECE // len(weight))
        for start in range(0, len(own), size):
            rows = slice(start, start + size)
            scores = F.linear(own[rows], weight, bias) if projects else own[rows]
            here = scores.log_softmax(1)
            apart = F.linear(before[rows], weight, bias).log_softmax(1).neg_().add_(here)  # log p - log q
            task = here.gather(1, known[rows])
            probable = here.exp_()
            distance = (probable * apart).sum(1, keepdim=True)
            total += ((1 - alpha) * distance - alpha * task)[:, 0].where(counts[rows], 0).double().sum()
            # alpha (p - y) + (1 - alpha) p (log p - log q - KL)
            gradient = apart.sub_(distance).mul_(1 - alpha).add_(alpha).mul_(probable)
            gradient.scatter_add_(1, known[rows], gradient.new_full((len(gradient), 1), -alpha))
            gradient *= share[rows, None]
            if projects:
                torch.mm(gradient, weight, out=at_own[rows])
            else:
                at_own[rows] = gradient
        ctx.save_for_backward(at_own)
        return (total / number).to(own.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,), (at_own,) = gradients, ctx.saved_tensors
        return (at_own * factor, *[None] * 7)
