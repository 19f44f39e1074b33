"""Pixels that come without statistics of their own are read as those that a network is trained on."""

from dataclasses import replace

import torch

from unlocked.data import Dataset, ImageDataset

__all__ = ["read_as_trained"]


def read_as_trained(data: Dataset, train: Dataset | None) -> Dataset:
    """The data with the mean and deviation of the training images, where both are uint8 and it has none of its own.
    What a loader yields as uint8 is normalised so as well; floats and tokens are used as they are.

    Args:
        train: what the network is trained on; None: nobody knows.

    Raises:
        ValueError: images with statistics, for a network whose training images have none.
    """
    if not isinstance(train, ImageDataset) or train.images.dtype != torch.uint8:
        return data
    own = data.mean or data.std
    if own and not (train.mean or train.std) and isinstance(data, ImageDataset):
        raise ValueError(
            f"the {data.split} images are normalised (mean {data.mean}, std {data.std}), those that the network is "
            "trained on only divided by 255; give both as datasets with their statistics, or both as tensors"
        )
    if own or (isinstance(data, ImageDataset) and data.images.dtype != torch.uint8):
        return data
    return replace(data, mean=train.mean, std=train.std)
