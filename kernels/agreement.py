"""Cross-entropy together with agreement between two layers' scores, in pieces: [N, V] is never whole in memory.

Both layers' scores are made of latents by a weight, so that what travels from the layer before are its latents and
not its scores, which are larger by V / D. The gradient at a piece's scores is known as soon as they are.
"""

from torch import Tensor

from unlocked.kernels.vocabulary import IGNORED, Before, linear_loss

__all__ = ["linear_agreement", "scores_agreement"]


def linear_agreement(
    latents: Tensor,
    before: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    own: tuple[Tensor, Tensor | None] | None = None,
    alpha: float,
    ignore_index: int = IGNORED,
    hits: Tensor | None = None,
) -> Tensor:
    """alpha CE(p, y) + (1 - alpha) KL(p || q), mean over the rows that count (0 where none does), where p are the
    probabilities of the scores latents weightT + bias and q those of before weightT + bias.

    Latents get a gradient, and the weight and bias in `own`: KL's at the scores is p (log p - log q - KL).

    Args:
        latents, before: [N, D] float32.
        weight: [V, D] float32, and bias [V] or None.
        targets: [N] int64 in [0, V), or `ignore_index` where a row does not count.
        own: weight and bias that make p's scores, where they are not those of q's.
        hits: [] float64; how many rows have their target first is added to it.
    """
    other = Before(before, weight, bias, alpha)
    mine = (weight.detach(), None if bias is None else bias.detach()) if own is None else own
    return linear_loss(latents, *mine, targets, ignore_index, hits, before=other)


def scores_agreement(
    scores: Tensor,
    before: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    alpha: float,
    ignore_index: int = IGNORED,
) -> Tensor:
    """The same for scores [N, V] that are there already; these get the gradient."""
    other = Before(before, weight, bias, alpha)
    return linear_loss(scores, None, None, targets, ignore_index, None, before=other)
