"""Image folders: any folder of images by class, and the datasets that are published as such.

Images are decoded once, by several processes, into an array of bytes on disk that is mapped into memory (see
`unlocked.data.cache`); it lies in `.decoded` below the dataset, or in the user's cache folder where that can't be
written.
"""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from unlocked.data.cache import ImageFiles, cached_images
from unlocked.data.dataset import ImageDataset
from unlocked.data.decode import image_size as size_of
from unlocked.data.download import Archive, obtain
from unlocked.data.listing import Listing, class_names, list_by_class

__all__ = ["default_cache_dir", "load_folder", "load_imagenette", "load_imagenette_basic", "load_listings"]

Splits = tuple[ImageDataset, ImageDataset]

# Of ImageNet's training images, in common use (torchvision's models); the authors' choice for all of these datasets.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RESIDENT_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4  # larger sets are streamed
_TEST_FOLDERS = ("test", "val", "validation")
_CUT_SIZE = 128  # side of what a network reads of Imagenette and Visual Wake Words, in the authors' experiments


def load_folder(
    *,
    name: str = "folder",
    dataset_dir: Path = Path("datasets"),
    image_size: int | None = None,
    channels: int = 3,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Splits:
    """The images in `dataset_dir`/train/CLASS and `dataset_dir`/test/CLASS (or val/CLASS), in folders of any depth.

    Classes are numbered in the order of their names. Values are normalised by the training set's own statistics. Which
    files are read says `unlocked.data.listing`, what they become docs/data.md.

    Args:
        image_size: scale the shorter side to this many pixels and cut the square in the middle out. None: all images
            must have one size.
        channels: 3 (RGB) or 1 (grey): what images are converted to.
        cache_dir: where decoded images are kept; None: `dataset_dir`/.decoded.
        workers: processes that decode; None: one per CPU.

    Raises:
        ValueError: a folder is missing, a class has no images, a file can't be read, or sizes differ (names both).
    """
    if channels not in (1, 3):
        raise ValueError(f"dataset {name}: channels is 1 (grey) or 3 (RGB), got {channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"dataset {name}: image_size is a positive number of pixels, got {image_size}")
    train_dir = dataset_dir / "train"
    test_dir = next((dataset_dir / word for word in _TEST_FOLDERS if (dataset_dir / word).is_dir()), None)
    if not train_dir.is_dir() or test_dir is None:
        lacking = "train" if not train_dir.is_dir() else " or ".join(_TEST_FOLDERS)
        raise ValueError(
            f"dataset {name}: no folder {lacking} in {dataset_dir}; images by class lie in DIR/train/CLASS and "
            "DIR/test/CLASS (or val), DIR being --dataset-dir"
        )
    classes = class_names(train_dir)
    return load_listings(
        name,
        list_by_class(train_dir, classes),
        list_by_class(test_dir, classes),
        classes,
        size=image_size,
        resize=image_size,
        channels=channels,
        cache_dir=cache_dir or default_cache_dir(dataset_dir),
        workers=workers,
    )


def load_imagenette(
    *,
    name: str = "IMAGENETTE",
    dataset_dir: Path = Path("datasets"),
    download: bool = True,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Splits:
    """Ten classes of ImageNet (J. Howard, https://github.com/fastai/imagenette) in `dataset_dir`/imagenette2-160 (the
    authors' choice, downloaded if need be), imagenette2-320 or imagenette2: train/WNID and val/WNID.

    As in the authors' experiments, the shorter side is scaled to 160 pixels and 128 x 128 are read: at random when
    training, from the middle when evaluating. Of what lies further out than 160 x 160 nothing is kept.
    """
    return _imagenette(160, name, dataset_dir, download, cache_dir, workers)


def load_imagenette_basic(
    *,
    name: str = "IMAGENETTE_BASIC",
    dataset_dir: Path = Path("datasets"),
    download: bool = True,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Splits:
    """The same with the shorter side scaled to 132 pixels."""
    return _imagenette(132, name, dataset_dir, download, cache_dir, workers)


_IMAGENETTE = {
    "imagenette2-160": "e793b78cc4c9e9a4ccc0c1155377a412",
    "imagenette2-320": "3df6f0d01a2c9592104656642f5e78a3",
    "imagenette2": "fe2fc210e6bb7c5664d602c3cd71e612",
}
"""Folder -> MD5 sum of its .tgz, as torchvision has them."""
_IMAGENETTE_CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def _imagenette(
    shorter: int, name: str, dataset_dir: Path, download: bool, cache_dir: Path | None, workers: int | None
) -> Splits:
    present = [one for one in _IMAGENETTE if (dataset_dir / one).is_dir() or (dataset_dir / f"{one}.tgz").is_file()]
    chosen = (present or list(_IMAGENETTE))[0]
    archive = Archive(
        url=f"https://s3.amazonaws.com/fast-ai-imageclas/{chosen}.tgz", md5=_IMAGENETTE[chosen], folder=chosen
    )
    folder = obtain(archive, dataset_dir, download=download)
    wnids = tuple(_IMAGENETTE_CLASSES)
    return load_listings(
        name,
        list_by_class(folder / "train", wnids),
        list_by_class(folder / "val", wnids),
        tuple(_IMAGENETTE_CLASSES.values()),
        size=shorter,
        resize=shorter,
        margin=(shorter - _CUT_SIZE) // 2,
        imagenet_statistics=True,
        cache_dir=cache_dir or default_cache_dir(folder),
        workers=workers,
    )


def load_listings(
    name: str,
    train: Listing,
    test: Listing,
    classes: tuple[str, ...],
    *,
    size: int | None,
    resize: int | None,
    cache_dir: Path,
    margin: int = 0,
    channels: int = 3,
    imagenet_statistics: bool = False,
    workers: int | None = None,
) -> Splits:
    """Both splits from their files.

    Args:
        size: side of the square that is kept; None: as the first training image, and all must be like it.
        resize, workers: see `unlocked.data.cache`.
        margin: of the datasets, see `ImageDataset`.
        imagenet_statistics: normalise by ImageNet's mean and std instead of the training set's own.
    """
    example = train.root / train.paths[0]
    height, width = (size, size) if size is not None else size_of(example)
    cached = [
        cached_images(
            ImageFiles(
                name=f"{name}-{word}-{channels}x{height}x{width}",
                root=listing.root,
                paths=listing.paths,
                channels=channels,
                height=height,
                width=width,
                resize=resize,
                example=str(example),
            ),
            cache_dir,
            workers=workers,
        )
        for word, listing in (("train", train), ("test", test))
    ]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet_statistics else (cached[0].mean, cached[0].std)

    def split(word: str, listing: Listing, images: Tensor) -> ImageDataset:
        return ImageDataset(
            name=name,
            split=word,
            images=images,
            labels=torch.tensor(listing.labels, dtype=torch.int64),
            num_classes=len(classes),
            classes=classes,
            mean=mean,
            std=tuple(max(value, 1.0 / 255.0) for value in std),  # all pixels of a channel may be alike
            margin=margin,
            streamed=True if images.nbytes > _RESIDENT_BYTES else None,
        )

    return split("train", train, cached[0].images), split("test", test, cached[1].images)


def default_cache_dir(folder: Path) -> Path:
    """`folder`/.decoded, or a folder of its own in the user's cache where that can't be written."""
    if os.access(folder, os.W_OK) or (folder / ".decoded").is_dir():
        return folder / ".decoded"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "unlocked" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
