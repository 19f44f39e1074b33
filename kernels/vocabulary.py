"""Cross-entropy of many scores in pieces: [N, V] is never whole in memory, neither forward nor back.

The gradient at a piece's scores is known as soon as they are (softmax minus target), so it is taken back to latents and
weight at once and the scores are dropped. Peak memory is one piece and the gradients of what was given.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels.reference import label_ranks

__all__ = ["IGNORED", "PIECE", "linear_cross_entropy", "pieces"]

PIECE = 1 << 22
"""Scores of a piece: 16 MiB of float32."""
IGNORED = -100
"""torch's own mark of a position that does not count."""


def pieces(rows: int, scores: int) -> Iterator[slice]:
    """Rows whose scores, `scores` each, make a piece; cut by the sizes alone, so that every engine cuts alike."""
    size = max(1, PIECE // max(scores, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def linear_cross_entropy(
    latents: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    hits: Tensor | None = None,
) -> Tensor:
    """The mean cross-entropy of the scores latents weightT + bias over the rows that count; 0 where none does.

    Equal to `F.cross_entropy(F.linear(latents, weight, bias), targets, ...)` but for rounding.

    Args:
        latents: [N, D] float32.
        weight: [V, D] float32.
        targets: [N] int64 in [0, V), or `ignore_index` where a row does not count.
        bias: [V] or None.
        label_smoothing: the share of the target that is spread evenly over all V.
        hits: [] float64; how many rows have their target first is added to it.
    """
    found: Tensor = _LinearCrossEntropy.apply(latents, weight, bias, targets, ignore_index, label_smoothing, hits)
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        hits: Tensor | None,
    ) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        counts = targets != ignore_index
        number = counts.sum().clamp_min(1)
        share = counts.to(latents.dtype) / number
        known = targets.where(counts, 0)
        total = latents.new_zeros((), dtype=torch.float64)
        at_latents = torch.empty_like(latents) if wants[0] else None
        at_weight = torch.zeros_like(weight) if wants[1] else None
        at_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        for rows in pieces(len(latents), len(weight)):
            scores = F.linear(latents[rows], weight, bias)
            if hits is not None:
                hits += ((label_ranks(scores, known[rows]) < 1) & counts[rows]).sum()
            scores -= scores.logsumexp(1, keepdim=True)  # log-probabilities
            losses = -scores.gather(1, known[rows, None])[:, 0]
            if label_smoothing:
                losses = (1 - label_smoothing) * losses - label_smoothing * scores.mean(1)
            total += (losses.where(counts[rows], 0).double()).sum()
            if not any(wants):
                continue
            gradient = scores.exp_()
            if label_smoothing:
                gradient -= label_smoothing / len(weight)
            own = torch.full_like(losses[:, None], label_smoothing - 1)
            gradient.scatter_add_(1, known[rows, None], own)
            gradient *= share[rows, None]
            if at_latents is not None:
                torch.mm(gradient, weight, out=at_latents[rows])
            if at_weight is not None:
                at_weight.addmm_(gradient.T, latents[rows])
            if at_bias is not None:
                at_bias += gradient.sum(0)
        ctx.save_for_backward(at_latents, at_weight, at_bias)
        return (total / number).to(latents.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        found = [None if one is None else one * factor for one in ctx.saved_tensors]
        return (*found, None, None, None, None)
