"""scikit-learn's handwritten digits: 1797 real grey images of 8x8 pixels that come with the library.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unlocked.data.dataset import ImageDataset, channel_statistics
from unlocked.data.order import epoch_order

__all__ = ["load_digits"]

_TEST_SHARE = 0.2
_SPLIT_SEED = 0  # of the split, which is part of the dataset: no run's seed changes it


def load_digits(*, name: str = "digits") -> tuple[ImageDataset, ImageDataset]:
    """Training and test split, 80 to 20 in every class, the same in every run."""
    raw = _read()
    images = raw[:, :-1].view(-1, 1, 8, 8).mul(255.0 / 16.0).round().to(torch.uint8)  # values 0 .. 16
    labels = raw[:, -1].to(torch.int64)
    is_test = _stratified(labels)
    mean, std = channel_statistics(images[~is_test])

    def split(word: str, rows: Tensor) -> ImageDataset:
        return ImageDataset(
            name=name, split=word, images=images[rows], labels=labels[rows], num_classes=10, mean=mean, std=std
        )

    return split("train", ~is_test), split("test", is_test)


def _read() -> Tensor:
    """float64 [1797, 65]: 64 pixels, then the label. The library's file, without the library, which takes a second and
    imports SciPy; where it keeps the file elsewhere, by its own function."""
    found = find_spec("sklearn")
    folders = found.submodule_search_locations if found is not None else None
    path = Path(folders[0] if folders else "", "datasets", "data", "digits.csv.gz")
    if path.is_file():
        with gzip.open(path, "rt", encoding="ascii") as file:
            return torch.from_numpy(np.loadtxt(file, delimiter=","))
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.from_numpy(np.concatenate([raw.data, raw.target[:, None]], axis=1))


def _stratified(labels: Tensor) -> Tensor:
    """bool [N]: a keyed fifth of every class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    order = epoch_order(len(labels), _SPLIT_SEED, epoch=0)
    for label in labels.unique():
        rows = order[labels[order] == label]
        chosen[rows[: round(_TEST_SHARE * len(rows))]] = True
    return chosen
