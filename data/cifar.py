"""CIFAR-10 and CIFAR-100 in their official layouts on disk, `cifar-10-batches-py` and `cifar-100-python`.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009;
https://www.cs.toronto.edu/~kriz/cifar.html. The files are pickles made by Python 2. A pickle can run any code, so
ours are read by an unpickler that knows numpy arrays and nothing else.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from unlocked.data.dataset import ImageDataset
from unlocked.data.download import Archive, obtain

__all__ = ["CIFAR10", "CIFAR100", "Cifar", "load_cifar10", "load_cifar100", "read_cifar"]

# The authors' constants, in common use for both datasets: the std is the mean over CIFAR-10's images of each one's own.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
IMAGE_SHAPE = (3, 32, 32)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cifar:
    """One of the two datasets."""

    title: str
    archive: Archive
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    labels_key: str
    meta_file: str
    names_key: str
    num_classes: int


CIFAR10 = Cifar(
    title="CIFAR-10",
    archive=Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
    ),
    train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test_files=("test_batch",),
    labels_key="labels",
    meta_file="batches.meta",
    names_key="label_names",
    num_classes=10,
)
CIFAR100 = Cifar(
    title="CIFAR-100",
    archive=Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files=("train", "test", "meta"),
    ),
    train_files=("train",),
    test_files=("test",),
    labels_key="fine_labels",
    meta_file="meta",
    names_key="fine_label_names",
    num_classes=100,
)
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000


def load_cifar10(
    *, name: str = "CIFAR10", dataset_dir: Path = Path("datasets"), download: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """50,000 training and 10,000 test images from `dataset_dir`/cifar-10-batches-py.

    Raises:
        ValueError: the folder is missing and can't be downloaded, or one of its files is missing or damaged.
    """
    return read_cifar(CIFAR10, obtain(CIFAR10.archive, dataset_dir, download=download), name=name)


def load_cifar100(
    *, name: str = "CIFAR100", dataset_dir: Path = Path("datasets"), download: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """The same of CIFAR-100 from `dataset_dir`/cifar-100-python, with its 100 fine labels."""
    return read_cifar(CIFAR100, obtain(CIFAR100.archive, dataset_dir, download=download), name=name)


def read_cifar(
    kind: Cifar,
    folder: Path,
    *,
    name: str | None = None,
    train_images: int = TRAIN_IMAGES,
    test_images: int = TEST_IMAGES,
) -> tuple[ImageDataset, ImageDataset]:
    """As `load_cifar10` and `load_cifar100`, of the folder with the files itself, which hold that many images."""
    classes = _class_names(kind, folder / kind.meta_file)

    def split(word: str, files: tuple[str, ...], total: int) -> ImageDataset:
        parts = [_read_file(kind, folder / file, total // len(files)) for file in files]
        pixels = np.concatenate([part[0] for part in parts]).reshape(-1, *IMAGE_SHAPE)
        labels = np.concatenate([part[1] for part in parts])
        return ImageDataset(
            name=name or kind.title,
            split=word,
            images=torch.from_numpy(pixels),
            labels=torch.from_numpy(labels),
            num_classes=kind.num_classes,
            classes=classes,
            mean=MEAN,
            std=STD,
        )

    return split("train", kind.train_files, train_images), split("test", kind.test_files, test_images)


def _read_file(kind: Cifar, path: Path, count: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels [count, 3072] in the order C, H, W, and labels [count]."""
    num_pixels = int(np.prod(IMAGE_SHAPE))
    expected = (
        f"a pickled dict with 'data' (uint8 [{count}, {num_pixels}]) and '{kind.labels_key}' ({count} integers from 0 "
        f"to {kind.num_classes - 1})"
    )
    content, damaged = _load(kind, path, expected)
    pixels, labels = content.get("data"), content.get(kind.labels_key)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (count, num_pixels):
        raise damaged(f"data {_describe(pixels)}")
    try:
        label_array = np.asarray(labels)
    except ValueError as error:
        raise damaged(f"{kind.labels_key} of several shapes") from error
    if label_array.dtype.kind not in "iu" or label_array.shape != (count,):
        raise damaged(f"{kind.labels_key} {_describe(label_array)}")
    if label_array.min() < 0 or label_array.max() >= kind.num_classes:
        raise damaged(f"{kind.labels_key} from {label_array.min()} to {label_array.max()}")
    return pixels, label_array.astype(np.int64)


def _class_names(kind: Cifar, path: Path) -> tuple[str, ...]:
    """Empty where the file is missing: nothing but the names is in it."""
    if not path.is_file():
        return ()
    content, damaged = _load(kind, path, f"a pickled dict with '{kind.names_key}' ({kind.num_classes} names)")
    names = content.get(kind.names_key)
    if not isinstance(names, list) or len(names) != kind.num_classes:
        raise damaged(f"{kind.names_key} of type {type(names).__name__}")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)


def _load(kind: Cifar, path: Path, expected: str) -> tuple[dict[Any, Any], Callable[[str], ValueError]]:
    """The pickled dict, and what makes an error of what is wrong with it."""
    advice = "remove its folder to have it downloaded again, or copy the file from an intact one"

    def damaged(found: str) -> ValueError:
        return ValueError(f"{kind.title} file {path} is damaged: expected {expected}, found {found}; {advice}")

    if not path.is_file():
        raise ValueError(f"{kind.title} file {path} is missing: expected {expected}; {advice}")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # bytes that are no pickle can raise almost anything
        raise damaged(f"what can't be read ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise damaged(f"a {type(content).__name__}")
    # Python 2's strings arrive as bytes; files written by Python 3 have str.
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}, damaged


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
