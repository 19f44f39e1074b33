"""Tiny ImageNet and Visual Wake Words, whose labels stand in files beside the images."""

import json
from pathlib import Path
from typing import Any

from unlocked.data.dataset import ImageDataset
from unlocked.data.decode import kind_of_file
from unlocked.data.download import Archive, obtain
from unlocked.data.folders import default_cache_dir, load_listings
from unlocked.data.listing import Listing, class_names, list_by_class

__all__ = ["load_tiny_imagenet", "load_vww"]

Splits = tuple[ImageDataset, ImageDataset]

TINY_IMAGENET = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    md5="90528d7ca1a48142e341f4ef8d21d0de",
    folder="tiny-imagenet-200",
)
_VWW_SHORTER, _VWW_CUT = 132, 128  # pixels, as in the authors' experiments


def load_tiny_imagenet(
    *,
    name: str = "TinyIMAGENET",
    dataset_dir: Path = Path("datasets"),
    download: bool = True,
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Splits:
    """200 classes of ImageNet at 64 x 64 pixels (Stanford CS231n) from `dataset_dir`/tiny-imagenet-200.

    Training images lie in train/WNID/images, the test set is the published validation set: val/images, with labels in
    val/val_annotations.txt; or, as many scripts sort it, val/WNID/images or val/WNID. Classes are the lines of
    wnids.txt, in the order of their names; words.txt names them.

    Raises:
        ValueError: files are missing, damaged, or contradict each other.
    """
    folder = obtain(TINY_IMAGENET, dataset_dir, download=download)
    wnids = tuple(sorted(_lines(folder / "wnids.txt")))
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    return load_listings(
        name,
        list_by_class(folder / "train", wnids),
        _tiny_validation(folder / "val", wnids),
        tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids),
        size=None,
        resize=None,
        imagenet_statistics=True,
        cache_dir=cache_dir or default_cache_dir(folder),
        workers=workers,
    )


def load_vww(
    *,
    name: str = "VWW",
    dataset_dir: Path = Path("datasets"),
    cache_dir: Path | None = None,
    workers: int | None = None,
) -> Splits:
    """Visual Wake Words: is there a person in the image? (A. Chowdhery et al., arXiv 1906.05721.)

    Read from `dataset_dir`/VWW, or from `dataset_dir` itself, in the layout that the dataset's scripts
    (https://github.com/Mxbonn/visualwakewords) make of COCO and the authors' code reads: all images of COCO's train2014
    and val2014 in all2014 (or all), and in annotations the files instances_train.json and instances_val.json in COCO's
    format. An image with an annotation of category 1 is of class "person". There is no archive to download.

    As in the authors' experiments, the shorter side is scaled to 132 pixels and 128 x 128 are read: at random when
    training, from the middle when evaluating.

    Raises:
        ValueError: files are missing or damaged, or a class has no images.
    """
    home = dataset_dir / "VWW" if (dataset_dir / "VWW").is_dir() else dataset_dir
    images = next((home / word for word in ("all2014", "all") if (home / word).is_dir()), None)
    if images is None or not (home / "annotations").is_dir():
        raise ValueError(
            f"no Visual Wake Words in {dataset_dir / 'VWW'} or {dataset_dir}: expected all2014 with COCO's images, and "
            "annotations/instances_train.json and instances_val.json, which the scripts of "
            "https://github.com/Mxbonn/visualwakewords make of COCO's"
        )
    classes = ("no person", "person")
    train, test = (_wake_words(images, home / "annotations" / f"instances_{word}.json") for word in ("train", "val"))
    return load_listings(
        name,
        train,
        test,
        classes,
        size=_VWW_SHORTER,
        resize=_VWW_SHORTER,
        margin=(_VWW_SHORTER - _VWW_CUT) // 2,
        imagenet_statistics=True,
        cache_dir=cache_dir or default_cache_dir(home),
        workers=workers,
    )


def _tiny_validation(folder: Path, wnids: tuple[str, ...]) -> Listing:
    unsorted = folder / "images"
    if folder.is_dir() and (sorted_into := sorted(set(class_names(folder)) & set(wnids))):
        if unsorted.is_dir() and any(not one.name.startswith(".") for one in unsorted.iterdir()):
            raise ValueError(
                f"{folder} holds images both in images and sorted by class, in {sorted_into[0]} for one; leave the one "
                "or the other there"
            )
        return list_by_class(folder, wnids, besides=("images",))
    annotations = folder / "val_annotations.txt"
    numbers = {wnid: label for label, wnid in enumerate(wnids)}
    paths, labels = [], []
    for line in _lines(annotations):
        file, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in numbers:
            raise ValueError(f"{annotations} is damaged: {line[:80]!r} does not name a file and one of the classes")
        paths.append(f"images/{file}")
        labels.append(numbers[wnid])
    if lacking := sorted(set(wnids) - {wnids[label] for label in labels}):
        raise ValueError(f"class {lacking[0]!r} has no images in {annotations}")
    return Listing(folder, paths, labels)


def _wake_words(images: Path, annotations: Path) -> Listing:
    try:
        content: Any = json.loads(_text(annotations))
        with_person = {one["image_id"] for one in content["annotations"] if one["category_id"] == 1}
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{annotations} is missing or damaged ({type(error).__name__}: {error}); expected COCO's format with "
            "images and annotations"
        ) from error
    ids = sorted(files)
    labels = [int(one in with_person) for one in ids]
    for label, word in enumerate(("no person", "person")):
        if label not in labels:
            raise ValueError(f"class {word!r} has no images in {annotations}")
    return Listing(images, [files[one] for one in ids], labels)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in _text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def _text(path: Path) -> str:
    """Of a regular file: reading a pipe might never end."""
    if kind := kind_of_file(path.stat().st_mode):
        raise OSError(f"it is {kind}, no regular file")
    return path.read_text()
