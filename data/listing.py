"""Which files of a folder tree are the images of a class.

Every file with an image's extension, in folders of any depth. Names that begin with a dot are skipped, folders as well
as files. Links are followed, but within a class each real folder is entered once, and those that the class lies in
never, so that a circle ends where it closes. A link that leads nowhere is an error, since whole folders may be missing.
Names that differ only in how Unicode composes letters (NFC or NFD, as file systems have them) are one class.
"""

import os
import stat
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Listing", "class_names", "list_by_class"]

EXTENSIONS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of one split: paths below `root`, and their labels."""

    root: Path
    paths: list[str]
    labels: list[int]


def class_names(root: Path) -> tuple[str, ...]:
    """The names of the folders in `root`, sorted, in Unicode's composed form (NFC).

    Raises:
        ValueError: there are none, or a link leads nowhere.
    """
    names = tuple(sorted(_class_folders(root)))
    if not names:
        raise ValueError(f"{root} has no folders; expected one folder of images per class in it")
    return names


def list_by_class(root: Path, classes: tuple[str, ...], *, besides: tuple[str, ...] = ()) -> Listing:
    """The images below `root`/CLASS, class by class, sorted by path.

    Args:
        besides: folders in `root` that are no classes.

    Raises:
        ValueError: a class without images, a folder of no known class or that can't be read, or a link that leads
            nowhere.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; expected one folder of images per class in it")
    folders = _class_folders(root)
    if unknown := sorted(folders.keys() - {_composed(name) for name in classes} - {*besides}):
        raise ValueError(
            f"{root} has folders of unknown classes: {', '.join(unknown[:5])}; the {len(classes)} classes are "
            f"{', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )
    begin = len(os.path.join(root, ""))
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted((path[begin:] for path in _images_below(folders.get(_composed(name), ()))), key=_in_order)
        if not found:
            extensions = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"class {name!r} has no images: looked for {extensions} in {root / name}")
        paths += found
        labels += [label] * len(found)
    return Listing(root, paths, labels)


def _class_folders(root: Path) -> dict[str, list[str]]:
    """Class -> its folders: more than one where names differ in Unicode's forms only."""
    folders: dict[str, list[str]] = {}
    for entry, mode in _entries(os.fspath(root)):
        if stat.S_ISDIR(mode):
            folders.setdefault(_composed(entry.name), []).append(entry.path)
    return folders


def _images_below(folders: Iterable[str]) -> Iterator[str]:
    """What lies below a class's folders without a link comes first, then link by link in the order of their paths, so
    that a link to what is there already changes nothing."""
    starts = deque(sorted(folders))
    entered = {key for folder in starts for key in _places_of(folder)}
    while starts:
        waiting = [starts.popleft()]
        links: list[str] = []
        while waiting:
            folder = waiting.pop()
            with _named("folder", folder):
                status = os.stat(folder)
            if (key := (status.st_dev, status.st_ino)) in entered:
                continue
            entered.add(key)
            for entry, mode in _entries(folder):
                if stat.S_ISDIR(mode):
                    (links if entry.is_symlink() else waiting).append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    yield entry.path
        starts.extend(sorted(links))


def _entries(folder: str) -> Iterator[tuple[os.DirEntry[str], int]]:
    """What is in the folder and does not begin with a dot, and whether that, or what a link leads to, is a folder or a
    file, as in st_mode."""
    with _named("folder", folder), os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in found:
        if entry.is_symlink():
            with _named("link", entry.path):
                yield entry, os.stat(entry.path).st_mode
        else:  # without a system call: the folder says which entries are folders
            yield entry, stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG


def _places_of(folder: str) -> set[tuple[int, int]]:
    """(device, inode) of every folder that this one lies in, by its own path and where a link leads."""
    parents = {*Path(folder).absolute().parents, *Path(os.path.realpath(folder)).parents}
    return {(status.st_dev, status.st_ino) for status in map(os.stat, parents)}


@contextmanager
def _named(what: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "; mend or remove it" if what == "link" else ""
        raise ValueError(f"{what} {path} can't be read: {error.strerror}{advice}") from error


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _in_order(path: str) -> tuple[list[str], str]:
    return _composed(path).split("/"), path
