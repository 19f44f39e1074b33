"""CIFAR-10 in its official layout on disk, `cifar-10-batches-py`.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. The files are pickles made by Python 2. A pickle can run any code, so
ours are read by an unpickler that knows numpy arrays and nothing else.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from unlocked.data.dataset import ImageDataset
from unlocked.data.download import Archive, obtain

__all__ = ["CIFAR10_ARCHIVE", "load_cifar10", "read_cifar10"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The authors' constants, in common use: the std is the mean over images of each image's own.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
IMAGE_SHAPE = (3, 32, 32)
IMAGES_PER_FILE = 10_000
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)

CIFAR10_ARCHIVE = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    files=(*TRAIN_FILES, *TEST_FILES, "batches.meta"),
)


def load_cifar10(
    *, name: str = "CIFAR10", dataset_dir: Path = Path("datasets"), download: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """50,000 training and 10,000 test images from `dataset_dir`/cifar-10-batches-py.

    Raises:
        ValueError: the folder is missing and can't be downloaded, or one of its files is missing or damaged.
    """
    return read_cifar10(obtain(CIFAR10_ARCHIVE, dataset_dir, download=download), name=name)


def read_cifar10(
    folder: Path, *, name: str = "CIFAR10", images_per_file: int = IMAGES_PER_FILE
) -> tuple[ImageDataset, ImageDataset]:
    """As `load_cifar10`, of the folder with the batch files itself."""

    def split(word: str, names: tuple[str, ...]) -> ImageDataset:
        parts = [_read_batch(folder / file, images_per_file) for file in names]
        pixels = np.concatenate([part[0] for part in parts]).reshape(-1, *IMAGE_SHAPE)
        labels = np.concatenate([part[1] for part in parts])
        return ImageDataset(
            name=name,
            split=word,
            images=torch.from_numpy(pixels),
            labels=torch.from_numpy(labels),
            num_classes=len(CLASSES),
            classes=CLASSES,
            mean=MEAN,
            std=STD,
        )

    return split("train", TRAIN_FILES), split("test", TEST_FILES)


def _read_batch(path: Path, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels [count, 3072] in the order C, H, W, and labels [count]."""
    num_pixels = int(np.prod(IMAGE_SHAPE))
    expected = f"a pickled dict with 'data' (uint8 [{count}, {num_pixels}]) and 'labels' ({count} integers from 0 to 9)"
    advice = "remove its folder to have it downloaded again, or copy the file from an intact one"

    def damaged(found: str) -> ValueError:
        return ValueError(f"CIFAR-10 file {path} is damaged: expected {expected}, found {found}; {advice}")

    if not path.is_file():
        raise ValueError(f"CIFAR-10 file {path} is missing: expected {expected}; {advice}")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # bytes that are no pickle can raise almost anything
        raise damaged(f"what can't be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise damaged(f"a {type(content).__name__}")
    # Python 2's strings arrive as bytes; files written by Python 3 have str.
    content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    pixels, labels = content.get("data"), content.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (count, num_pixels):
        raise damaged(f"data {_describe(pixels)}")
    try:
        label_array = np.asarray(labels)
    except ValueError as error:
        raise damaged("labels of several shapes") from error
    if label_array.dtype.kind not in "iu" or label_array.shape != (count,):
        raise damaged(f"labels {_describe(label_array)}")
    if label_array.min() < 0 or label_array.max() >= len(CLASSES):
        raise damaged(f"labels from {label_array.min()} to {label_array.max()}")
    return pixels, label_array.astype(np.int64)


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `codecs.encode`, by which Python 3 writes bytes into old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}, only latin1 is read")
    return text.encode(encoding)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain Python values and numpy arrays; anything else in the pickle is an error before it runs."""

    def __init__(self, file: BinaryIO, *, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        # Asked of numpy itself, since the modules that hold these functions moved between numpy 1 and 2.
        sample = np.zeros(1, dtype=np.uint8)
        reconstruct, from_buffer = sample.__reduce__()[0], sample.__reduce_ex__(5)[0]
        self._known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
            **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in ("core", "_core")},
            **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")},
        }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array") from None
