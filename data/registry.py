"""Datasets by name."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from unlocked.data.cifar import load_cifar10, load_cifar100
from unlocked.data.dataset import Augmentation, ImageDataset
from unlocked.data.digits import load_digits
from unlocked.data.folders import load_folder, load_imagenette, load_imagenette_basic
from unlocked.data.mnist import load_fashion_mnist, load_mnist
from unlocked.data.published import load_tiny_imagenet, load_vww
from unlocked.data.synthetic import load_synthetic
from unlocked.data.text import load_stdlib, load_text

__all__ = ["DATASETS", "load_dataset"]

Splits = tuple[ImageDataset, ImageDataset]

_FLIP = Augmentation(flip=True)
_FULL = Augmentation(flip=True, crop_padding=4, erase_probability=0.2)

DATASETS: dict[str, tuple[Callable[..., Splits], Augmentation]] = {
    "digits": (load_digits, Augmentation()),
    "synthetic": (load_synthetic, Augmentation()),
    "CIFAR10": (load_cifar10, _FLIP),
    "CIFAR10AUG": (load_cifar10, _FULL),
    "CIFAR100": (load_cifar100, _FLIP),
    "CIFAR100AUG": (load_cifar100, _FULL),
    "MNIST": (load_mnist, Augmentation(crop_padding=4)),
    "FashionMNIST": (load_fashion_mnist, Augmentation(flip=True, crop_padding=4)),
    "IMAGENETTE": (load_imagenette, Augmentation(flip=True, crop_margin=True, erase_probability=0.2)),
    "IMAGENETTE_BASIC": (load_imagenette_basic, Augmentation(flip=True, crop_margin=True)),
    "TinyIMAGENET": (load_tiny_imagenet, Augmentation(flip=True, erase_probability=0.2)),
    "VWW": (load_vww, Augmentation(flip=True, crop_margin=True)),
    "folder": (load_folder, _FLIP),
    "stdlib": (load_stdlib, Augmentation()),
    "text": (load_text, Augmentation()),
}
"""Name -> the loader of both splits, and how the training set is augmented unless the caller says otherwise (as the
authors' code augments the dataset of that name)."""


def load_dataset(
    name: str,
    dataset_dir: str | Path = "datasets",
    *,
    augmentation: Augmentation | None = None,
    download: bool = True,
    streamed: bool | None = None,
    **options: Any,
) -> Splits:
    """The training and the test set called `name`, on the CPU.

    Args:
        name: "digits" (scikit-learn's, real, 8x8, needs no file), "synthetic" (32x32 by default, learnable), "folder"
            (images by class, see `load_folder`), "stdlib" (the source of Python's standard library as bytes), "text"
            (the files of a folder), or a published dataset: `DATASETS` lists them; CIFAR10 is mirrored,
            CIFAR10AUG mirrored, cropped and erased.
        dataset_dir: the folder that holds the datasets in their official layouts, or gets them; for "folder" the one
            with train and test.
        augmentation: of the training set, in place of the dataset's own.
        download: whether a dataset that is not in `dataset_dir` may be downloaded into it.
        streamed: read ahead from where the data lies (True), or hold it on the device as a whole (False); None: as its
            size suggests. See `ImageDataset.streamed`.
        options: for "synthetic": num_train, num_test, num_classes, channels, image_size, seed; for "folder":
            image_size, channels; for "stdlib" and "text": sequence_length, num_train, num_test, and "text"'s
            tokenizer; for all that are decoded: cache_dir, workers.

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
    given = {"dataset_dir": Path(dataset_dir), "download": download}
    files = {key: value for key, value in given.items() if key in parameters}
    train, test = loader(name=name, **files, **options)
    if streamed is not None:
        train, test = replace(train, streamed=streamed), replace(test, streamed=streamed)
    return replace(train, augmentation=default if augmentation is None else augmentation), test
