"""Images made by a formula, for trying things out and for measuring speed: learnable, of any size, no files.

An image is a smooth pattern of its class, plus a weaker smooth pattern drawn at random, plus noise. All of it is
integer arithmetic on numbers from numpy's Philox bit stream, so every machine makes the same bytes.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from unlocked.data.dataset import ImageDataset, channel_statistics
from unlocked.kernels.images import sides_of
from unlocked.kernels.philox import Purpose, philox_int

__all__ = ["load_synthetic"]

# The three parts' ranges in grey values; they add up to less than 256.
_CLASS_RANGE = 64
_DISTRACTOR_RANGE = 64
_NOISE_SHIFT = 1  # a byte of noise shifted right by this: below 128
_DISTRACTORS = 64
_GRID = 4  # a pattern is drawn on _GRID x _GRID points and interpolated between them
_CHUNK = 2**24  # bytes of noise at a time

Bytes = npt.NDArray[np.uint8]


def load_synthetic(
    *,
    name: str = "synthetic",
    num_train: int = 50_000,
    num_test: int = 10_000,
    num_classes: int = 10,
    channels: int = 3,
    image_size: int | Sequence[int] = 32,
    seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """Training and test split, of CIFAR-10's size by default.

    Args:
        image_size: side of square images in pixels, or height and width of others.

    Raises:
        ValueError: a size is not positive.
    """
    sizes = {
        "num_train": num_train,
        "num_test": num_test,
        "num_classes": num_classes,
        "channels": channels,
    }
    for word, size in sizes.items():
        if size < 1:
            raise ValueError(f"dataset {name}: {word} is a positive integer, got {size}")
    try:
        shape = (channels, *sides_of(image_size))
    except ValueError as error:
        raise ValueError(f"dataset {name}: {error}") from None
    patterns = _patterns(_stream(seed, 0), num_classes, shape, _CLASS_RANGE)
    distractors = _patterns(_stream(seed, 1), _DISTRACTORS, shape, _DISTRACTOR_RANGE)
    train_images, train_labels = _draw(_stream(seed, 2), num_train, patterns, distractors)
    test_images, test_labels = _draw(_stream(seed, 3), num_test, patterns, distractors)
    mean, std = channel_statistics(train_images[:1000])

    def split(word: str, images: torch.Tensor, labels: torch.Tensor) -> ImageDataset:
        return ImageDataset(
            name=name, split=word, images=images, labels=labels, num_classes=num_classes, mean=mean, std=std
        )

    return split("train", train_images, train_labels), split("test", test_images, test_labels)


def _stream(seed: int, part: int) -> np.random.Philox:
    return np.random.Philox(key=philox_int(seed, Purpose.SYNTHETIC, part))


def _random_bytes(stream: np.random.Philox, count: int) -> Bytes:
    """The stream's 64-bit words as little-endian bytes."""
    return stream.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]


def _patterns(stream: np.random.Philox, count: int, shape: tuple[int, int, int], value_range: int) -> Bytes:
    """uint8 [count, C, H, W] in [0, value_range): random grids, bilinearly interpolated in integers."""
    channels, height, width = shape
    grid = _random_bytes(stream, count * channels * _GRID * _GRID).reshape(count, channels, _GRID, _GRID)
    rows, row_scale = _interpolation(height)
    columns, column_scale = _interpolation(width)
    fine = rows @ grid.astype(np.int64) @ columns.T
    return (fine * value_range // (256 * row_scale * column_scale)).astype(np.uint8)


def _interpolation(size: int) -> tuple[npt.NDArray[np.int64], int]:
    """Weights [size, _GRID] of linear interpolation, in units of 1 / scale."""
    scale = max(size - 1, 1)
    position = np.arange(size) * (_GRID - 1)
    cell = np.minimum(position // scale, _GRID - 2)
    weights = np.zeros((size, _GRID), dtype=np.int64)
    weights[np.arange(size), cell + 1] = position - cell * scale
    weights[np.arange(size), cell] = scale - (position - cell * scale)
    return weights, scale


def _draw(
    stream: np.random.Philox, count: int, patterns: Bytes, distractors: Bytes
) -> tuple[torch.Tensor, torch.Tensor]:
    labels = (stream.random_raw(count) % len(patterns)).astype(np.int64)
    others = (stream.random_raw(count) % len(distractors)).astype(np.int64)
    images = np.empty((count, *patterns.shape[1:]), dtype=np.uint8)
    pixels = images[0].size
    step = max(_CHUNK // (8 * pixels), 1) * 8  # a multiple of 8 images never splits a word, whatever their size
    for start in range(0, count, step):
        part = images[start : start + step]
        np.right_shift(_random_bytes(stream, part.size).reshape(part.shape), _NOISE_SHIFT, out=part)
        part += patterns[labels[start : start + step]]
        part += distractors[others[start : start + step]]
    return torch.from_numpy(images), torch.from_numpy(labels)
