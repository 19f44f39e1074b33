"""The order of an epoch, as a function of its key alone."""

import torch
from torch import Tensor

from unlocked.kernels.philox import Purpose, keyed_uniform

__all__ = ["class_order", "epoch_order"]


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


def class_order(
    labels: Tensor, classes_per_batch: int, batch_size: int, seed: int, epoch: Tensor | int, purpose: Purpose
) -> Tensor:
    """An order, int64 [n], in which every `batch_size` rows hold samples of `classes_per_batch` classes, as evenly as
    can be. The same for the same key on every device.

    The classes are dealt from decks that are shuffled by (seed, epoch), so that all are there equally often; a class
    gives its samples in a shuffled order and begins anew when it has no more. So all samples of balanced classes are
    visited about once, those of a rare class oftener and those of a frequent one less.

    Args:
        labels: int64 [n], in [0, number of classes); at least `classes_per_batch` of them differ.
        purpose: as for `epoch_order`.
    """
    n, device = len(labels), labels.device
    members = epoch_order(n, seed, epoch, device, purpose)
    members = members[torch.argsort(labels[members], stable=True)]  # by class, shuffled within
    counts = torch.bincount(labels)
    firsts = counts.cumsum(0) - counts
    present = counts.nonzero()[:, 0]
    rows = torch.arange(n, device=device)
    per_deck = len(present) // classes_per_batch  # micro-batches; what is left of a deck is put away
    decks = -(-n // batch_size) // per_deck + 1
    cards = torch.arange(decks * len(present), device=device) + (int(purpose) << 40)
    draws = keyed_uniform(seed, Purpose.CLASSES, cards, major=epoch)[:, 0].view(decks, -1)
    dealt = present[torch.argsort(draws, dim=1, stable=True)[:, : per_deck * classes_per_batch].reshape(-1)]
    batch, place = rows // batch_size, rows % batch_size
    chosen = dealt[batch * classes_per_batch + place % classes_per_batch]
    # How often the row's class was there before it.
    by_class = torch.argsort(chosen, stable=True)
    times = torch.bincount(chosen, minlength=len(counts))
    before = torch.empty_like(rows)
    before[by_class] = rows - (times.cumsum(0) - times)[chosen[by_class]]
    return members[firsts[chosen] + before % counts[chosen]]
