"""Datasets by name."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from unlocked.data.cifar import load_cifar10
from unlocked.data.dataset import Augmentation, ImageDataset
from unlocked.data.digits import load_digits
from unlocked.data.synthetic import load_synthetic

__all__ = ["DATASETS", "load_dataset"]

Splits = tuple[ImageDataset, ImageDataset]

_FLIP = Augmentation(flip=True)
_FULL = Augmentation(flip=True, crop_padding=4, erase_probability=0.2)

DATASETS: dict[str, tuple[Callable[..., Splits], Augmentation]] = {
    "digits": (load_digits, Augmentation()),
    "synthetic": (load_synthetic, Augmentation()),
    "CIFAR10": (load_cifar10, _FLIP),
    "CIFAR10AUG": (load_cifar10, _FULL),
}
"""Name -> the loader of both splits, and how the training set is augmented unless the caller says otherwise."""


def load_dataset(
    name: str,
    dataset_dir: str | Path = "datasets",
    *,
    augmentation: Augmentation | None = None,
    download: bool = True,
    **options: int,
) -> Splits:
    """The training and the test set called `name`, on the CPU.

    Args:
        name: "digits" (scikit-learn's, real, 8x8, needs no file), "synthetic" (32x32 by default, learnable),
            "CIFAR10" (mirrored) or "CIFAR10AUG" (mirrored, cropped, erased).
        dataset_dir: the folder that holds `cifar-10-batches-py`, or gets it.
        augmentation: of the training set, in place of the dataset's own.
        download: whether a dataset that is not in `dataset_dir` may be downloaded into it.
        options: for "synthetic": num_train, num_test, num_classes, channels, image_size, seed.

    Raises:
        ValueError: an unknown name or option (lists the valid ones); a file is missing or damaged (names it); the
            download failed (says what was looked for, where, and how to get it).
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is not known; valid: {', '.join(DATASETS)}")
    loader, default = DATASETS[name]
    parameters = inspect.signature(loader).parameters
    valid = [key for key in parameters if key not in ("name", "dataset_dir", "download")]
    if unknown := [key for key in options if key not in valid]:
        raise ValueError(f"dataset {name!r} has no option {', '.join(unknown)}; valid: {', '.join(valid) or 'none'}")
    files = {"dataset_dir": Path(dataset_dir), "download": download} if "dataset_dir" in parameters else {}
    train, test = loader(name=name, **files, **options)
    return replace(train, augmentation=default if augmentation is None else augmentation), test
