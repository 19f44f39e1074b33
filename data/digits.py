"""scikit-learn's handwritten digits: 1797 real grey images of 8x8 pixels that come with the library.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import torch
from torch import Tensor

from unlocked.data.dataset import ImageDataset, channel_statistics
from unlocked.data.order import epoch_order

__all__ = ["load_digits"]

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # of the split, which is part of the dataset: no run's seed changes it


def load_digits(*, name: str = "digits") -> tuple[ImageDataset, ImageDataset]:
    """Training and test split, 80 to 20 in every class, the same in every run."""
    from sklearn import datasets  # takes a second to import

    raw = datasets.load_digits()
    images = torch.from_numpy(raw.images)[:, None].mul(255.0 / 16.0).round().to(torch.uint8)  # values 0 .. 16
    labels = torch.from_numpy(raw.target).to(torch.int64)
    is_test = _stratified(labels)
    mean, std = channel_statistics(images[~is_test])

    def split(word: str, rows: Tensor) -> ImageDataset:
        return ImageDataset(
            name=name, split=word, images=images[rows], labels=labels[rows], num_classes=10, mean=mean, std=std
        )

    return split("train", ~is_test), split("test", is_test)


def _stratified(labels: Tensor) -> Tensor:
    """bool [N]: a keyed fifth of every class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = epoch_order(len(labels), _SPLIT_SEED, epoch=0)
    for label in labels.unique():
        rows = order[labels[order] == label]
        chosen[rows[: round(_TEST_SHARE * len(rows))]] = True
    return chosen
