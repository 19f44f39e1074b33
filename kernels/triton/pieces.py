# mypy: allow-untyped-defs, allow-incomplete-defs
"""The pieces a local rule in Triton is made of, those of the LLS family, and `HeadPieces`, which puts them together.

The head kernel (`head_kernels.py`) is specialised with five small `@triton.jit` functions. Each works on *one row*
(one sample) as whole float32 vectors whose lengths are powers of two; a bool vector `inside` is true where the vector
is data and not padding. Padding comes in as zero, and what a piece leaves there is ignored.

    features, saved = latents(z, inside)
    raw             = features · basisᵀ                                 (the kernel's; raw = features without a basis)
    scores          = scores(raw, modulation, row_stride, stride, ROWS, CLASSES, BLOCK)
    loss, d_scores, correct = loss(scores, label, inside, CLASSES, temperature, label_smoothing)
    d_raw, weight_row = scores_backward(d_scores, raw, modulation, row_stride, stride, ROWS, CLASSES, BLOCK)
    d_features      = d_raw · basis                                     (the kernel's)
    d_z             = latents_backward(d_features, features, saved, z, inside)

- `latents` may return anything in `saved` (a scalar or a vector) for its way back.
- `loss` returns the row's own loss, its derivative with respect to the scores, and whether the row counts as correct.
  The kernel divides the derivative by the number of rows: gradients are those of the mean.
- `scores` returns BLOCK values, of which the first CLASSES count. `modulation` is the pointer to the rule's learned
  tensor (None if the rule has none) with strides in elements. `weight_row` [BLOCK] is summed over the batch into the
  gradient of a modulation [N]; a modulation [R, N] gets raw ⊗ weight_row, summed over the batch.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import triton
import triton.language as tl

__all__ = [
    "LLS_MATRIX",
    "LLS_PLAIN",
    "LLS_VECTOR",
    "HeadPieces",
    "cross_entropy",
    "first_maximum_is",
    "identity",
    "identity_backward",
    "label_rank",
    "matrix_scores",
    "matrix_scores_backward",
    "plain_scores",
    "plain_scores_backward",
    "unit_length",
    "unit_length_backward",
    "vector_scores",
    "vector_scores_backward",
]

_NORM_EPS = tl.constexpr(1e-12)  # the clamp of torch.nn.functional.normalize


# What becomes of the latents


@triton.jit
def identity(z, inside):
    """Latents go in as they are."""
    return z, 1.0


@triton.jit
def identity_backward(features_grad, features, saved, z, inside):
    return features_grad


@triton.jit
def unit_length(z, inside):
    """z / max(|z|, 1e-12); keeps the clamped norm."""
    norm = tl.maximum(tl.sqrt(tl.sum(z * z, axis=0)), _NORM_EPS)
    return z / norm, norm


@triton.jit
def unit_length_backward(features_grad, features, saved, z, inside):
    """The part of the gradient across the direction, over the norm. Below the clamp only the division is left."""
    along = tl.sum(features_grad * features, axis=0)
    along = tl.where(saved > _NORM_EPS, along, 0.0)
    return (features_grad - features * along) / saved


# What becomes of the raw scores


@triton.jit
def plain_scores(raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """LLS: the raw scores are the scores."""
    return raw


@triton.jit
def plain_scores_backward(
    scores_grad, raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    return scores_grad, scores_grad


@triton.jit
def vector_scores(raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """LLS-M: times a learned vector [N]."""
    return raw * _load_vector(modulation, stride, CLASSES, BLOCK)


@triton.jit
def vector_scores_backward(
    scores_grad, raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    return scores_grad * _load_vector(modulation, stride, CLASSES, BLOCK), scores_grad * raw


@triton.jit
def matrix_scores(raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """LLS-MxM: raw [R] times a learned matrix [R, N], in tiles of its rows."""
    TILE: tl.constexpr = _tile_rows(raw.shape[0], BLOCK)
    if raw.shape[0] == TILE:
        tile = _load_rows(modulation, row_stride, stride, 0, ROWS, CLASSES, TILE, BLOCK)
        scores = tl.sum(raw[:, None] * tile, axis=0)
    else:
        scores = tl.zeros([BLOCK], tl.float32)
        for start in range(0, ROWS, TILE):
            tile = _load_rows(modulation, row_stride, stride, start, ROWS, CLASSES, TILE, BLOCK)
            scores += tl.sum(take(raw, start, TILE)[:, None] * tile, axis=0)
    return scores


@triton.jit
def matrix_scores_backward(
    scores_grad, raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    TILE: tl.constexpr = _tile_rows(raw.shape[0], BLOCK)
    if raw.shape[0] == TILE:
        tile = _load_rows(modulation, row_stride, stride, 0, ROWS, CLASSES, TILE, BLOCK)
        raw_grad = tl.sum(tile * scores_grad[None, :], axis=1)
    else:
        raw_grad = tl.zeros([raw.shape[0]], tl.float32)
        for start in range(0, ROWS, TILE):
            tile = _load_rows(modulation, row_stride, stride, start, ROWS, CLASSES, TILE, BLOCK)
            raw_grad += place(tl.sum(tile * scores_grad[None, :], axis=1), start, raw.shape[0])
    return raw_grad, scores_grad


# The loss


@triton.jit
def cross_entropy(scores, label, inside, CLASSES: tl.constexpr, temperature, label_smoothing):
    """Cross-entropy of softmax(scores / temperature) with label smoothing (Szegedy et al. 2016)."""
    index = tl.arange(0, scores.shape[0])
    logits = tl.where(inside, scores / temperature, float("-inf"))
    shifted = logits - tl.max(logits, axis=0)
    log_probs = tl.where(inside, shifted - tl.log(tl.sum(tl.exp(shifted), axis=0)), 0.0)
    share = label_smoothing / CLASSES
    target = tl.where(index == label, 1.0 - label_smoothing + share, share)
    counts = inside & (target != 0.0)  # a class may be out of question, at -inf
    loss = -tl.sum(tl.where(counts, target * log_probs, 0.0), axis=0)
    scores_grad = (tl.exp(log_probs) - target) / temperature
    return loss, scores_grad, first_maximum_is(label, scores, inside)


# Tools for pieces


@triton.jit
def first_maximum_is(label, scores, inside):
    """Whether `label` is the index of the largest score (the first of equals)."""
    index = tl.arange(0, scores.shape[0])
    best = tl.max(tl.where(inside, scores, float("-inf")), axis=0)
    first = tl.min(tl.where(inside & (scores == best), index, scores.shape[0]), axis=0)
    return first == label


@triton.jit
def label_rank(scores, label, inside):
    """How many classes come before `label`: those with a larger score, and of equal ones those with a smaller index."""
    index = tl.arange(0, scores.shape[0])
    of_label = tl.sum(tl.where(index == label, scores, 0.0), axis=0)
    before = (scores > of_label) | ((scores == of_label) & (index < label))
    return tl.sum((inside & before).to(tl.int32), axis=0)


@triton.jit
def take(vector, start, TILE: tl.constexpr):
    """vector[start : start + TILE]. A select and a sum, because registers can't be indexed; the sum is exact."""
    wanted = start + tl.arange(0, TILE)[:, None] == tl.arange(0, vector.shape[0])[None, :]
    return tl.sum(tl.where(wanted, vector[None, :], 0.0), axis=1)


@triton.jit
def place(part, start, BLOCK: tl.constexpr):
    """A vector [BLOCK] that holds `part` from `start` on and zeros elsewhere: the way back of `take`."""
    wanted = start + tl.arange(0, part.shape[0])[:, None] == tl.arange(0, BLOCK)[None, :]
    return tl.sum(tl.where(wanted, part[:, None], 0.0), axis=0)


@triton.jit
def _load_vector(pointer, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    return tl.load(pointer + index * stride, mask=index < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _load_rows(
    pointer,
    row_stride,
    stride,
    start,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows start .. start + TILE of a matrix, zero outside of it."""
    rows, columns = start + tl.arange(0, TILE), tl.arange(0, BLOCK)
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :] * stride
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.constexpr_function
def _tile_rows(block_rows, block):
    """Rows of a matrix [block_rows, block] to hold at once: all if they fit, else so few that `take` fits too."""
    if block_rows * block <= 8192:  # 64 registers per thread at 4 warps
        return block_rows
    return max(1, min(block_rows, 8192 // max(block_rows, block)))


@dataclass(frozen=True)
class HeadPieces:
    """Five `@triton.jit` functions; the defaults are those of plain LLS, so a rule names only what differs.

    Raises:
        ValueError: a piece is not a `@triton.jit` function.
    """

    latents: Any = unit_length
    latents_backward: Any = unit_length_backward
    scores: Any = plain_scores
    scores_backward: Any = plain_scores_backward
    loss: Any = cross_entropy

    def __post_init__(self) -> None:
        for item in fields(self):
            piece = getattr(self, item.name)
            if not isinstance(piece, triton.runtime.KernelInterface):
                raise ValueError(f"piece {item.name!r} must be a @triton.jit function, got {piece!r}; decorate it")


LLS_PLAIN = HeadPieces()
LLS_VECTOR = replace(LLS_PLAIN, scores=vector_scores, scores_backward=vector_scores_backward)
LLS_MATRIX = replace(LLS_PLAIN, scores=matrix_scores, scores_backward=matrix_scores_backward)
