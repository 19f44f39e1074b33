"""The order of an epoch, as a function of its key alone."""

import torch
from torch import Tensor

from unlocked.kernels.philox import Purpose, keyed_uniform

__all__ = ["epoch_order"]


def epoch_order(
    n: int,
    seed: int,
    epoch: Tensor | int,
    device: torch.device | str = "cpu",
    purpose: Purpose = Purpose.SHUFFLE,
) -> Tensor:
    """A permutation of 0 .. n - 1, int64 [n] on `device`: the same for the same key on every device.

    Every sample draws 48 bits by (seed, purpose, epoch, sample); the order is their stable sort. BatchNorm
    re-estimation passes `Purpose.STATISTICS`, so that it does not repeat the epoch's own micro-batches.
    """
    samples = torch.arange(n, device=device)
    high, low = (keyed_uniform(seed, purpose, samples, major=epoch)[:, :2] * 2.0**24).to(torch.int64).unbind(1)
    return torch.argsort(high << 24 | low, stable=True)
