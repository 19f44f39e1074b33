"""From a piece of scores to the gradient at them: `score_gradients` of kernels/vocabulary.py over the C++ kernel."""

import torch
from torch import Tensor

from unlocked.kernels import vocabulary
from unlocked.kernels.cpp.bindings import load_kernels

__all__ = ["score_gradients"]


def score_gradients(
    scores: Tensor,
    targets: Tensor,
    shares: Tensor,
    sums: Tensor,
    *,
    before: Tensor | None = None,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int,
    out: Tensor | None,
) -> None:
    """See `kernels.vocabulary.score_gradients`: one pass over each row while it is in the cache, for float32."""
    rows, classes = scores.shape
    given = [one for one in (scores, shares, before, out) if one is not None]
    fits = all(one.dtype == torch.float32 and one.is_contiguous() for one in given) and sums.is_contiguous()
    if not fits or rows == 0:
        vocabulary.score_gradients(
            scores,
            targets,
            shares,
            sums,
            before=before,
            alpha=alpha,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            out=out,
        )
        return
    targets = targets.contiguous()
    found = torch.zeros(2, dtype=torch.float64)
    load_kernels().unlocked_score_gradients(
        min(torch.get_num_threads(), rows),
        scores.data_ptr(),
        None if before is None else before.data_ptr(),
        rows,
        classes,
        targets.data_ptr(),
        ignore_index,
        shares.data_ptr(),
        alpha if before is not None else 1.0,
        label_smoothing,
        None if out is None else out.data_ptr(),
        found.data_ptr(),
    )
    sums += found[: len(sums)]
