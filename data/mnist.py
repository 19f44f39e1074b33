"""MNIST and FashionMNIST in the IDX format of their official files.

Sources: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits" (format and data); H. Xiao,
K. Rasul, R. Vollgraf, "Fashion-MNIST", 2017; the MD5 sums are those that Zalando and torchvision publish. The files lie
in `dataset_dir`/NAME/raw (torchvision's layout), in `dataset_dir`/NAME, or in `dataset_dir` itself, compressed or not.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from unlocked.data.dataset import ImageDataset
from unlocked.data.download import obtain_file

__all__ = ["load_fashion_mnist", "load_mnist", "read_idx"]

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 1 << 30  # of an unpacked file; the largest known one has 47 million


@dataclass(frozen=True, slots=True)
class _Mnist:
    folder: str
    base_url: str
    md5: dict[str, str]
    classes: tuple[str, ...]
    mean: tuple[float]
    std: tuple[float]


_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_SPLITS = {"train": _FILES[:2], "test": _FILES[2:]}

# mean and std as the authors' code has them, where 255 counts as 1.
_MNIST = _Mnist(
    folder="MNIST",
    base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    md5=dict(
        zip(
            _FILES,
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            strict=True,
        )
    ),
    classes=tuple("0123456789"),
    mean=(0.5,),
    std=(0.5,),
)
_FASHION = _Mnist(
    folder="FashionMNIST",
    base_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    md5=dict(
        zip(
            _FILES,
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            strict=True,
        )
    ),
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    mean=(0.286,),
    std=(0.353,),
)


def load_mnist(
    *, name: str = "MNIST", dataset_dir: Path = Path("datasets"), download: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """60,000 training and 10,000 test images of 28 x 28 grey pixels.

    Raises:
        ValueError: a file is missing and can't be downloaded, or is damaged, or labels and images don't belong
            together.
    """
    return _load(_MNIST, name, dataset_dir, download)


def load_fashion_mnist(
    *, name: str = "FashionMNIST", dataset_dir: Path = Path("datasets"), download: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """The same of FashionMNIST."""
    return _load(_FASHION, name, dataset_dir, download)


def _unzipped(raw: bytes) -> bytes:
    """Raises:
    EOFError, zlib.error: it is damaged, or of more than a gigabyte, which is no such file.
    """
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with gzip's header
    data = unpacker.decompress(raw, _MOST_BYTES)
    if unpacker.unconsumed_tail:
        raise EOFError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
    if not unpacker.eof:
        raise EOFError("its end is missing")
    return data


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes, which may be compressed by gzip.

    The format: two zero bytes, one for the type, one for the number of dimensions; every dimension as a big-endian
    32-bit integer; the values.

    Raises:
        ValueError: the file is damaged, or no such file.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = _unzipped(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"what can't be read ({type(error).__name__}: {error})") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE or not 1 <= raw[3] <= 4:
        raise _damaged(path, f"the first bytes {raw[:4].hex(' ') or 'none'}")
    begin = 4 + 4 * raw[3]
    if len(raw) < begin:
        raise _damaged(path, f"{len(raw)} bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:begin], dtype=">u4"))
    if len(raw) - begin != int(np.prod(shape, dtype=np.int64)):
        raise _damaged(path, f"{len(raw) - begin} values where its header says {list(shape)}")
    return np.frombuffer(raw, dtype=np.uint8, offset=begin).reshape(shape).copy()


def _load(kind: _Mnist, name: str, dataset_dir: Path, download: bool) -> tuple[ImageDataset, ImageDataset]:
    def split(word: str) -> ImageDataset:
        image_path, label_path = (_find(kind, file, dataset_dir, download) for file in _SPLITS[word])
        images, labels = read_idx(image_path), read_idx(label_path)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{image_path} holds {list(images.shape)} and {label_path} {list(labels.shape)}; expected [N, H, W] "
                "and [N]"
            )
        if len(labels) and labels.max() >= len(kind.classes):
            raise _damaged(label_path, f"labels up to {labels.max()}")
        return ImageDataset(
            name=name,
            split=word,
            images=torch.from_numpy(images)[:, None],
            labels=torch.from_numpy(labels.astype(np.int64)),
            num_classes=len(kind.classes),
            classes=kind.classes,
            mean=kind.mean,
            std=kind.std,
        )

    return split("train"), split("test")


def _find(kind: _Mnist, file: str, dataset_dir: Path, download: bool) -> Path:
    home = dataset_dir / kind.folder / "raw"
    for folder in (home, home.parent, dataset_dir):
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file():
                return path
    return obtain_file(f"{kind.base_url}{file}.gz", kind.md5[file], home / f"{file}.gz", download=download)


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(
        f"IDX file {path} is damaged: expected unsigned bytes (0, 0, 8, dimensions, sizes, values), found {found}; "
        "remove it to have it downloaded again, or copy it from an intact folder"
    )
