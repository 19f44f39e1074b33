# mypy: allow-untyped-defs, allow-incomplete-defs
"""The generic head for rules outside the LLS family whose scores are one row per sample: made of pieces.

| head | rule | basis | modulation | `temperature`, `label_smoothing` |
| --- | --- | --- | --- | --- |
| `projection_head` | Mono-Forward: G = a M^T, cross-entropy | M | none | 1, 0 |
| `classifier_head` | predictive similarity's prediction: W z + b, cross-entropy | W | b [N] | 1, 0 |
| `distance_head` | Distance-Forward: nearness, N-pair margin loss | 2 m / sqrt(D) | -|m|^2 / D [N] | T, margin |

All but `distance_head` take latents as they are (`normalize=False`); Distance-Forward's features are sqrt(D) times the
latents' direction, so -|f - m_c|^2 / D = direction . (2 m_c / sqrt(D)) - |m_c|^2 / D - 1, and what is the same for all
classes says nothing in its loss. `centre_arguments` makes its basis and modulation, `centre_gradient` the way back.
"""

from math import sqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlocked.kernels.triton.head import head_spec, make_head
from unlocked.kernels.triton.pieces import HeadPieces, first_maximum_is

__all__ = [
    "AOT_SPECS",
    "biased_scores",
    "biased_scores_backward",
    "centre_arguments",
    "centre_gradient",
    "classifier_head",
    "distance_head",
    "n_pair_margin",
    "projection_head",
]


@triton.jit
def biased_scores(raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """Plus a vector [N]."""
    index = tl.arange(0, BLOCK)
    return raw + tl.load(modulation + index * stride, mask=index < CLASSES, other=0.0).to(tl.float32)


@triton.jit
def biased_scores_backward(
    scores_grad, raw, modulation, row_stride, stride, ROWS: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    return scores_grad, scores_grad


@triton.jit
def n_pair_margin(scores, label, inside, CLASSES: tl.constexpr, temperature, margin):
    """log(1 + sum_(c != y) exp((g_c - g_y + margin) / T)) of at least two classes."""
    index = tl.arange(0, scores.shape[0])
    own = tl.sum(tl.where(index == label, scores, 0.0), axis=0)
    excess = tl.where(inside & (index != label), (scores - own + margin) / temperature, float("-inf"))
    largest = tl.max(excess, axis=0)
    total = largest + tl.log(tl.sum(tl.exp(excess - largest), axis=0))
    loss = tl.maximum(total, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(total)))
    pushed = tl.exp(excess - total) / ((1.0 + tl.exp(-total)) * temperature)
    scores_grad = tl.where(index == label, -tl.sum(pushed, axis=0), pushed)
    return loss, scores_grad, first_maximum_is(label, scores, inside)


_PROJECTION = HeadPieces()
_CLASSIFIER = HeadPieces(scores=biased_scores, scores_backward=biased_scores_backward)
_DISTANCE = HeadPieces(scores=biased_scores, scores_backward=biased_scores_backward, loss=n_pair_margin)

projection_head = make_head(_PROJECTION)
classifier_head = make_head(_CLASSIFIER)
distance_head = make_head(_DISTANCE)


def centre_arguments(centres: Tensor) -> tuple[Tensor, Tensor]:
    """(basis [N, D], modulation [N]) of `distance_head` for centres [N, D]."""
    dim = centres.shape[1]
    return centres * (2 / sqrt(dim)), centres.square().sum(1) / -dim


def centre_gradient(centres: Tensor, basis_grad: Tensor, modulation_grad: Tensor) -> Tensor:
    """Of trained centres, from the gradients of what `centre_arguments` made of them."""
    dim = centres.shape[1]
    return torch.addcmul(basis_grad * (2 / sqrt(dim)), centres, modulation_grad[:, None], value=-2 / dim)


_TRAINED: dict[str, Any] = {"trained_basis": True, "normalize": False}

# SmallConv's heads at batch 64, and the largest of each.
AOT_SPECS = [
    head_spec("SmallConv MonoForward 512", _PROJECTION, 512, 10, 10, **_TRAINED),
    head_spec("SmallConv PredictiveSimilarity 512", _CLASSIFIER, 512, 10, 10, 1, **_TRAINED),
    head_spec("SmallConv PredictiveSimilarity 256 bf16", _CLASSIFIER, 256, 10, 10, 1, "bf16", **_TRAINED),
    head_spec("SmallConv DistanceForward 512", _DISTANCE, 512, 10, 10, 1, trained_basis=True),
    head_spec("SmallConv DistanceForward 512 at batch 2048", _DISTANCE, 512, 10, 10, 1, trained_basis=True, batch=2048),
    head_spec("1000 classes, 8192 latents, PredictiveSimilarity", _CLASSIFIER, 8192, 1000, 1000, 1, **_TRAINED),
    head_spec("1000 classes, 8192 latents, DistanceForward", _DISTANCE, 8192, 1000, 1000, 1, trained_basis=True),
]
