"""The loss of many scores in pieces: [N, V] is never whole in memory, neither forward nor back.

The gradient at a piece's scores is known as soon as they are (softmax minus target), so it is taken back to latents and
weight at once and the scores are dropped. Peak memory is one piece and the gradients of what was given. What happens to
a piece between its two products is one operation, `score_gradients`, which a backend may have a kernel for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unlocked.kernels.reference import label_ranks

__all__ = ["IGNORED", "PIECE", "Before", "linear_cross_entropy", "linear_loss", "pieces", "score_gradients", "using"]

PIECE = 1 << 22
"""Scores of a piece: 16 MiB of float32."""
PAIR_PIECE = 1 << 20
"""The same where another layer's scores lie beside them, the fastest of 0.5 to 16 MiB on a CPU."""
FUSED_ROWS = 64
"""The fewest rows of a piece where a backend has a kernel: a product of fewer waits for the weight from memory."""
IGNORED = -100
"""torch's own mark of a position that does not count."""

_backend: ContextVar[ModuleType | None] = ContextVar("vocabulary backend", default=None)


@contextmanager
def using(backend: ModuleType | None) -> Iterator[None]:
    """Inside, pieces are computed by this backend, as far as it is able to; None: by plain PyTorch."""
    token = _backend.set(backend if backend is not None and backend.ABILITIES.vocabulary else None)
    try:
        yield
    finally:
        _backend.reset(token)


def pieces(rows: int, scores: int, most: int | None = None, fewest: int = 1) -> Iterator[slice]:
    """Rows whose scores, `scores` each, make a piece of at most `most` (default: `PIECE`), but `fewest` rows; cut by
    the sizes alone, so that every engine cuts alike."""
    size = max(fewest, (PIECE if most is None else most) // max(scores, 1))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def score_gradients(
    scores: Tensor,
    targets: Tensor,
    shares: Tensor,
    sums: Tensor,
    *,
    before: Tensor | None = None,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORED,
    out: Tensor | None,
) -> None:
    """The gradient at the scores of the sum over rows of share times loss.

    A row's loss is the cross-entropy of its softmax p, its target smoothed; with `before`, alpha times that and
    1 - alpha times KL(p || q), q the softmax of `before`, whose gradient at the scores is p (log p - log q - KL).

    Args:
        scores: [R, V].
        targets: [R] int64 in [0, V), or `ignore_index` where a row has no loss.
        shares: [R]; 0 where a row has no loss.
        sums: [1] or [2] float64; to the first the losses are added, to the second how many rows have their target
            first.
        before: [R, V] or None.
        out: [R, V], where the gradient goes, which may be the scores themselves; None: it is not wanted.
    """
    counts = targets != ignore_index
    known = targets.where(counts, 0)
    if len(sums) > 1:
        sums[1] += ((label_ranks(scores, known) < 1) & counts).sum()
    # log-probabilities
    scores = torch.sub(scores, scores.logsumexp(1, keepdim=True), out=out)
    losses = -scores.gather(1, known[:, None])[:, 0]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * scores.mean(1)
    weight = 1.0
    if before is None:
        gradient = scores if out is None else scores.exp_()
    else:
        weight = alpha
        apart = (before.logsumexp(1, keepdim=True) - before).add_(scores)  # log p - log q
        probable = scores.exp_()
        distance = (probable * apart).sum(1, keepdim=True)
        losses = alpha * losses + (1 - alpha) * distance[:, 0]
        gradient = probable.mul_(apart.sub_(distance).mul_(1 - alpha).add_(alpha))
    sums[0] += losses.where(counts, 0).double().sum()
    if out is None:
        return
    if label_smoothing:
        gradient -= weight * label_smoothing / scores.shape[1]
    gradient.scatter_add_(1, known[:, None], torch.full_like(losses[:, None], weight * (label_smoothing - 1)))
    gradient *= shares[:, None]


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
    return linear_loss(latents, weight, bias, targets, ignore_index, hits, label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Before:
    """The scores that a row's are compared with: of latents [N, D] by a head [V, D], or, without a weight, the latents
    themselves [N, V]. Nothing here gets a gradient."""

    latents: Tensor
    weight: Tensor | None
    bias: Tensor | None
    alpha: float
    """The share of the cross-entropy."""

    def scores(self, rows: slice, buffer: "_Buffer") -> Tensor:
        """[R, V], in the buffer unless they are there."""
        latents = self.latents[rows]
        if self.weight is None:
            return latents
        return _project(latents, self.weight, self.bias, buffer.first(rows, len(self.weight), latents))


def linear_loss(
    latents: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    hits: Tensor | None,
    *,
    label_smoothing: float = 0.0,
    before: Before | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """The mean over the rows that count of the loss that `score_gradients` has. Without a weight latents are scores.

    Args:
        known: [N, V], the scores that latents and weight give, where they are there already.
    """
    options = (targets, ignore_index, label_smoothing, hits, before, known)
    found: Tensor = _LinearLoss.apply(latents, weight, bias, *options)
    return found


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        label_smoothing: float,
        hits: Tensor | None,
        before: Before | None,
        known: Tensor | None,
    ) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        counts = targets != ignore_index
        number = counts.sum().clamp_min(1)
        shares = counts.to(latents.dtype) / number
        sums = latents.new_zeros(1 if hits is None else 2, dtype=torch.float64)
        at_latents = torch.empty_like(latents) if wants[0] else None
        at_weight = torch.zeros_like(weight) if weight is not None and wants[1] else None
        at_bias = torch.zeros_like(bias) if bias is not None and wants[2] else None
        backend = _backend.get()
        compute = score_gradients if backend is None else backend.score_gradients
        extent = (PIECE, FUSED_ROWS)
        if backend is None:
            extent = (PIECE if before is None else min(PIECE, PAIR_PIECE), 1)
        own, other = _Buffer(), _Buffer()
        for rows in pieces(len(latents), latents.shape[1] if weight is None else len(weight), *extent):
            if weight is None:
                scores = latents[rows]
                out = None if at_latents is None else at_latents[rows]
            else:
                place = own.first(rows, len(weight), latents)
                scores = _project(latents[rows], weight, bias, place) if known is None else known[rows]
                out = place if any(wants) else None
            compute(
                scores,
                targets[rows],
                shares[rows],
                sums,
                before=None if before is None else before.scores(rows, other),
                alpha=1.0 if before is None else before.alpha,
                label_smoothing=label_smoothing,
                ignore_index=ignore_index,
                out=out,
            )
            if out is None or weight is None:
                continue
            if at_latents is not None:
                torch.mm(out, weight, out=at_latents[rows])
            if at_weight is not None:
                at_weight.addmm_(out.T, latents[rows])
            if at_bias is not None:
                at_bias += out.sum(0)
        if hits is not None:
            hits += sums[1]
        ctx.save_for_backward(at_latents, at_weight, at_bias)
        return (sums[0] / number).to(latents.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        found = [None if one is None else one * factor for one in ctx.saved_tensors]
        return (*found, *[None] * 6)


class _Buffer:
    """One place for the scores of all pieces."""

    def __init__(self) -> None:
        self._place: Tensor | None = None

    def first(self, rows: slice, classes: int, like: Tensor) -> Tensor:
        """[R, V] for so many rows, of the type and on the device of `like`."""
        if self._place is None:
            self._place = like.new_empty(rows.stop - rows.start, classes)  # the first piece is the largest
        return self._place[: rows.stop - rows.start]


def _project(latents: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """latents weightT + bias, in `out`."""
    if bias is None:
        return torch.mm(latents, weight.T, out=out)
    return torch.addmm(bias, latents, weight.T, out=out)
