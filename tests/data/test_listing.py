"""Which files of a folder tree are read as a class's images."""

import fcntl
import os
import socket
import struct
import tempfile
import termios
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_files import draw, png, write_folder
from hypothesis import example, given
from hypothesis import strategies as st

from unlocked.data import load_dataset
from unlocked.data.listing import class_names, list_by_class

NAMES = ("a", "b", "one.png", "two.JPG", "notes.txt", ".hidden", ".three.png", "fifth")
KINDS = ("folder", "image", "pipe", "link to a folder", "link to a file")
Tree = list[tuple[str, int, str, int]]
trees = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 40), st.sampled_from(NAMES), st.integers(0, 40)), max_size=25
)


def grow(home: Path, tree: Tree) -> Path:
    """Two classes and a folder beside them, in which each step makes something in a place that is there already."""
    root = home / "train"
    folders = [home, root, root / "x", root / "y", home / "elsewhere"]
    for folder in folders[1:]:
        folder.mkdir()
    files = [root / "x" / "first.png", root / "y" / "first.png"]
    for file in files:
        file.touch()
    for kind, where, name, target in tree:
        inside = folders[2:]  # else there would be further classes
        path = inside[where % len(inside)] / name
        if os.path.lexists(path):
            continue
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "image":
            path.touch()
            files.append(path)
        elif kind == "link to a folder":
            path.symlink_to(folders[target % len(folders)])
        elif kind == "link to a file":
            path.symlink_to(files[target % len(files)])
        elif path.suffix not in (".png", ".JPG"):
            os.mkfifo(path)
    return root


def images_by_walking(folder: Path) -> list[tuple[str, str]]:
    """(real folder, name) of the images that a walk along all links comes by, where it turns back before a dot, a
    folder where it was before, and the folders that it began in."""
    closed = {os.path.realpath(parent) for parent in folder.parents}
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in closed:
            folders[:] = []
            continue
        closed.add(real)
        folders[:] = [name for name in folders if name[0] != "."]
        found += [(real, name) for name in files if name[0] != "." and name.lower().endswith((".png", ".jpg"))]
    return sorted(found)


@example(tree=[("link to a folder", 0, "a", 1), ("link to a folder", 1, "a", 2)])  # to the split; from class to class
@example(tree=[("folder", 0, ".hidden", 0), ("image", 3, "one.png", 0)])
@example(tree=[("folder", 0, "b", 0), ("image", 3, "one.png", 0), ("link to a folder", 0, "a", 5)])
@given(tree=trees)
def test_what_is_read_is_what_a_walk_comes_by(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as home:
        root = grow(Path(home), tree)
        listing = list_by_class(root, class_names(root))
        read: dict[int, list[tuple[str, str]]] = {0: [], 1: []}
        for path, label in zip(listing.paths, listing.labels, strict=True):
            folder, name = os.path.split(root / path)
            read[label].append((os.path.realpath(folder), name))
        for label, name in enumerate(("x", "y")):
            assert sorted(read[label]) == images_by_walking(root / name)
        assert list_by_class(root, class_names(root)) == listing


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_a_link_to_what_is_there_changes_nothing(tmp_path: Path) -> None:
    """Even where its name comes before that of the folder it leads to."""
    touch(tmp_path, "cat/deep/1.png", "cat/2.png", "dog/3.png")
    before = list_by_class(tmp_path, ("cat", "dog"))
    assert before.paths == ["cat/2.png", "cat/deep/1.png", "dog/3.png"]
    for link, target in {"a": "deep", "b": "..", "c": ".", "deep/d": "../..", "deep/e": "../a"}.items():
        (tmp_path / "cat" / link).symlink_to(target)
    assert list_by_class(tmp_path, ("cat", "dog")) == before


def test_links_to_other_places_are_followed(tmp_path: Path) -> None:
    touch(tmp_path, "pool/1.png", "pool/deep/2.png", "train/cat/3.png")
    (tmp_path / "train" / "cat" / "more").symlink_to("../../pool")
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "pool")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "pool")
    (tmp_path / "train" / "dog" / "up").symlink_to(tmp_path / "train")
    listing = list_by_class(tmp_path / "train", ("cat", "dog"))
    assert listing.paths == [
        *("cat/3.png", "cat/again/1.png", "cat/again/deep/2.png"),
        *("dog/1.png", "dog/deep/2.png"),
    ]


@pytest.mark.parametrize("link", ["cat/lost", "cat/deep/lost.png", "lost"])
@pytest.mark.parametrize(("target", "reason"), [("nowhere", "No such file"), (None, "Too many levels")])
def test_links_that_lead_nowhere_are_named(link: str, target: str | None, reason: str, tmp_path: Path) -> None:
    """Whole folders may be missing, as where a disk is not mounted."""
    touch(tmp_path, "cat/deep/1.png", ".hidden/2.png")
    (tmp_path / ".hidden" / "lost").symlink_to("nowhere")
    (tmp_path / "cat" / ".lost").symlink_to("nowhere")
    assert list_by_class(tmp_path, ("cat",)).paths == ["cat/deep/1.png"]
    (tmp_path / link).symlink_to(target or Path(link).name)
    with pytest.raises(ValueError, match=rf"^link {tmp_path}/{link} can't be read: {reason}.*; mend or remove it$"):
        list_by_class(tmp_path, ("cat",))


def test_names_that_unicode_composes_differently_are_one_class(tmp_path: Path) -> None:
    """As a file system that takes names apart (HFS+) would have copied the test set."""
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    train = write_folder(tmp_path / "train", {composed: 1, "bar": 1})
    test = write_folder(tmp_path / "test", {apart: 1, "bar": 1})
    (tmp_path / "train" / apart).mkdir()
    (tmp_path / "train" / apart / "001.png").write_bytes(png(draw(77)))
    first, second = load_dataset("folder", tmp_path)
    assert first.classes == second.classes == ("bar", composed)
    assert (first.labels.tolist(), second.labels.tolist()) == ([0, 1, 1], [0, 1])
    for data, expected in ((first, [train[1], train[0], draw(77)]), (second, [test[1], test[0]])):
        assert [image.permute(1, 2, 0).tolist() for image in data.images] == [image.tolist() for image in expected]


def test_the_order_is_that_of_composed_names(tmp_path: Path) -> None:
    """Else the same images would be another data set on another file system."""
    names = ["cat/ez.png", "cat/é.png", "cat/f.png", "cat/é/1.png"]
    orders = []
    for form in ("NFC", "NFD"):
        touch(tmp_path / form, *(unicodedata.normalize(form, name) for name in names))
        paths = list_by_class(tmp_path / form, ("cat",)).paths
        orders.append([unicodedata.normalize("NFC", path) for path in paths])
    assert orders[0] == orders[1] == ["cat/ez.png", "cat/f.png", "cat/é/1.png", "cat/é.png"]


def _socket(path: Path) -> Callable[[], None]:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    return server.close


def _pipe(path: Path) -> Callable[[], None]:
    """A pipe that holds something: whoever reads it does not wait, but is found out."""
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    os.write(end, bytes(4096))

    def close() -> None:
        left = struct.unpack("i", fcntl.ioctl(end, termios.FIONREAD, bytes(4)))
        os.close(end)
        assert left == (4096,), "it was read"

    return close


def _device(path: Path) -> Callable[[], None]:
    path.symlink_to("/dev/zero")
    return lambda: None


@pytest.mark.parametrize(
    ("make", "what"),
    [(_pipe, r"a pipe \(FIFO\)"), (_device, "a device"), (_socket, "a socket")],
    ids=["pipe", "device", "socket"],
)
@pytest.mark.parametrize("name", ["000.png", "5.png"])  # the first image, of which the size is asked; any other
@pytest.mark.parametrize("image_size", [None, 4])
def test_only_regular_files_are_opened(
    make: Callable[[Path], Callable[[], None]],
    what: str,
    name: str,
    image_size: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for split in ("train", "test"):
        touch(tmp_path, f"{split}/a/1.png")
        (tmp_path / split / "a" / "1.png").write_bytes(png(draw(1)))
    monkeypatch.chdir(tmp_path)  # the names of sockets are short
    close = make(Path("train") / "a" / name)
    with pytest.raises(ValueError, match=rf"^image train/a/{name} can't be read: it is {what}, no regular file$"):
        load_dataset("folder", ".", image_size=image_size)
    close()
