"""CIFAR-10 on disk and from a server on this machine, with archives in the official layout made here."""

import hashlib
import io
import pickle
import struct
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from file_server import Handler, serve

from unlocked.data import Augmentation, ImageDataset, load_dataset
from unlocked.data.cifar import CIFAR10, CIFAR100, Cifar, read_cifar
from unlocked.data.download import Archive, obtain

COUNT = 12  # images in each of our files
FOLDER = "cifar-10-batches-py"
TRAIN_FILES, TEST_FILES = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(folder: Path, kind: Cifar = CIFAR10) -> tuple[ImageDataset, ImageDataset]:
    return read_cifar(kind, folder, train_images=5 * COUNT, test_images=COUNT)


class _Python2Pickler(pickle._Pickler):
    """Writes bytes as strings of Python 2, as the official files have them; Python 3 can't by itself."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)  # type: ignore[attr-defined]

    dispatch[bytes] = save_string


def _python2(value: object) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def _content(number: int, count: int = COUNT) -> dict[bytes, Any]:
    draws = np.random.default_rng(number)
    pixels = draws.integers(0, 256, (count, 3072)).astype(np.uint8)
    return {b"batch_label": b"a batch", b"labels": draws.integers(0, 10, count).tolist(), b"data": pixels}


def _write(folder: Path, count: int = COUNT) -> dict[str, dict[bytes, Any]]:
    folder.mkdir(parents=True)
    contents = {name: _content(i, count) for i, name in enumerate((*TRAIN_FILES, *TEST_FILES))}
    for name, content in contents.items():
        (folder / name).write_bytes(_python2(content))
    (folder / "batches.meta").write_bytes(_python2({b"label_names": [name.encode() for name in CLASSES]}))
    return contents


def _check(data: ImageDataset, contents: list[dict[bytes, Any]]) -> None:
    pixels = np.concatenate([content[b"data"] for content in contents]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.images.numpy(), pixels)
    assert data.labels.tolist() == [label for content in contents for label in content[b"labels"]]


def test_reads_the_official_layout(tmp_path: Path) -> None:
    contents = _write(tmp_path / FOLDER)
    train, test = read_cifar10(tmp_path / FOLDER)
    _check(train, [contents[name] for name in TRAIN_FILES])
    _check(test, [contents["test_batch"]])
    assert (train.classes, train.mean, train.std) == (CLASSES, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("as_array", [False, True])
def test_reads_what_python_3_writes(tmp_path: Path, protocol: int, as_array: bool) -> None:
    contents = _write(tmp_path / FOLDER)
    content = {key.decode(): value for key, value in contents["test_batch"].items()}
    if as_array:
        content["labels"] = np.array(content["labels"], dtype=np.uint8)
    (tmp_path / FOLDER / "test_batch").write_bytes(pickle.dumps(content, protocol=protocol))
    _check(read_cifar10(tmp_path / FOLDER)[1], [contents["test_batch"]])


def test_load_dataset_takes_the_official_size_and_augments_as_named(tmp_path: Path) -> None:
    first, *others = (tmp_path / FOLDER / name for name in (*TRAIN_FILES, *TEST_FILES))
    first.parent.mkdir()
    first.write_bytes(_python2(_content(0, count=10_000)))
    for other in others:
        other.symlink_to(first)
    (first.parent / "batches.meta").write_bytes(_python2({b"label_names": [name.encode() for name in CLASSES]}))
    train, test = load_dataset("CIFAR10", tmp_path)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert (train.augmentation, test.augmentation) == (Augmentation(flip=True), Augmentation())
    train, test = load_dataset("CIFAR10AUG", tmp_path)
    assert train.augmentation == Augmentation(flip=True, crop_padding=4, erase_probability=0.2)
    assert test.augmentation == Augmentation()
    assert train.name == "CIFAR10AUG"


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    names = [b"apple", *(f"class {i}".encode() for i in range(1, 100))]
    folder, contents = tmp_path / "cifar-100-python", {}
    folder.mkdir()
    for word, count in (("train", 5 * COUNT), ("test", COUNT)):
        content = _content(count, count)
        fine = np.random.default_rng(count).integers(0, 100, count).tolist()
        content |= {b"fine_labels": fine, b"coarse_labels": [label // 5 for label in fine]}
        del content[b"labels"]
        (folder / word).write_bytes(_python2(content))
        contents[word] = content | {b"labels": fine}
    meta = {b"fine_label_names": names, b"coarse_label_names": names[:20]}
    (folder / "meta").write_bytes(_python2(meta))
    train, test = read_cifar10(folder, CIFAR100)
    _check(train, [contents["train"]])
    _check(test, [contents["test"]])
    assert (train.num_classes, train.classes[0], len(train.classes)) == (100, "apple", 100)
    (folder / "meta").write_bytes(_python2({b"fine_label_names": names[:99]}))
    with pytest.raises(ValueError, match=r"CIFAR-100 file .*meta is damaged: .*'fine_label_names' \(100 names"):
        read_cifar10(folder, CIFAR100)


class _Opens:
    """Would write a file when a plain unpickler loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_calls_anything_is_refused_before_it_does(tmp_path: Path) -> None:
    _write(tmp_path / FOLDER)
    trace = tmp_path / "trace"
    (tmp_path / FOLDER / "data_batch_3").write_bytes(pickle.dumps(_Opens(trace)))
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged.*is no part of an array"):
        read_cifar10(tmp_path / FOLDER)
    assert not trace.exists()


_DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "EOFError"),
    "no pickle": (b"hello", "can't be read"),
    "cut off": (_python2(_content(0))[:5000], "can't be read"),
    "a list": (_python2([1, 2]), "a list"),
    "no data": (_python2({b"labels": [0] * COUNT}), "data of type NoneType"),
    "no labels": (_python2({b"data": _content(0)[b"data"]}), r"labels object \[\]"),
    "short": (_python2(_content(0, COUNT - 1)), r"data uint8 \[11, 3072\]"),
    "other type": (_python2(_content(0) | {b"data": np.zeros((COUNT, 3072))}), "data float64"),
    "fewer labels": (_python2(_content(0) | {b"labels": [0] * (COUNT - 1)}), r"labels int64 \[11\]"),
    "nested labels": (_python2(_content(0) | {b"labels": [[0], [1, 2]]}), "labels of several shapes"),
    "label 10": (_python2(_content(0) | {b"labels": [10] * COUNT}), "labels from 10 to 10"),
    "label -1": (_python2(_content(0) | {b"labels": [-1] * COUNT}), "labels from -1 to -1"),
}


@pytest.mark.parametrize("kind", _DAMAGE)
def test_a_damaged_file_is_named_with_what_was_expected(tmp_path: Path, kind: str) -> None:
    _write(tmp_path / FOLDER)
    content, message = _DAMAGE[kind]
    (tmp_path / FOLDER / "data_batch_2").write_bytes(content)
    with pytest.raises(ValueError, match=rf"data_batch_2 is damaged: expected .*\[12, 3072\].*found .*{message}"):
        read_cifar10(tmp_path / FOLDER)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path / FOLDER)
    (tmp_path / FOLDER / "test_batch").unlink()
    with pytest.raises(ValueError, match="test_batch is missing: expected"):
        read_cifar10(tmp_path / FOLDER)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Archive, type[Handler]]]:
    """A server with the archive; `Archive` as a user of the module would name it, and the handler to set up."""
    site = tmp_path / "site"
    _write(site / FOLDER)
    path = site / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(site / FOLDER, FOLDER)
    with serve(site) as (url, handler):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        yield replace(CIFAR10.archive, url=f"{url}/{path.name}", md5=md5), handler


def _is_whole(folder: Path, site: Path) -> bool:
    read = [torch.cat([data.images for data in read_cifar10(f)]) for f in (folder, site / FOLDER)]
    return torch.equal(*read) and (folder / "batches.meta").is_file()


def test_download_unpacks_once(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive, handler = server
    target = tmp_path / "not" / "there"
    folder = obtain(archive, target, download=True)
    assert folder == target / FOLDER
    assert _is_whole(folder, tmp_path / "site")
    assert obtain(archive, target, download=False) == folder
    assert handler.requests == [None]
    assert not list(target.glob("*.part"))


def test_several_at_once_download_once(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive, handler = server
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: obtain(archive, tmp_path / "d", download=True), range(4)))
    assert folders == [tmp_path / "d" / FOLDER] * 4
    assert _is_whole(tmp_path / "d" / FOLDER, tmp_path / "site")
    assert handler.requests == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(
    tmp_path: Path, server: tuple[Archive, type[Handler]], ranges: bool
) -> None:
    archive, handler = server
    handler.cut, handler.ranges = 1000, ranges
    with pytest.raises(ValueError, match=r"failed: .*another try goes on from there.*put cifar-10-python.tar.gz into"):
        obtain(archive, tmp_path / "d", download=True)
    assert not (tmp_path / "d" / FOLDER).exists()
    handler.cut = None
    assert _is_whole(obtain(archive, tmp_path / "d", download=True), tmp_path / "site")
    assert handler.requests == [None, "bytes=1000-"]


def test_a_part_that_is_whole_already_is_only_checked(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive, handler = server
    (tmp_path / "d").mkdir()
    part = tmp_path / "d" / "cifar-10-python.tar.gz.part"
    part.write_bytes((tmp_path / "site" / archive.file_name).read_bytes())
    assert _is_whole(obtain(archive, tmp_path / "d", download=True), tmp_path / "site")
    assert handler.requests == [f"bytes={(tmp_path / 'd' / archive.file_name).stat().st_size}-"]


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive = replace(server[0], md5="0" * 32)
    with pytest.raises(ValueError, match=r"has the MD5 sum [0-9a-f]{32}, expected 0{32}"):
        obtain(archive, tmp_path / "d", download=True)
    assert [path.name for path in (tmp_path / "d").iterdir()] == [f".{FOLDER}.lock"]


def test_an_archive_put_there_by_hand_is_used(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive, handler = server
    target = tmp_path / "d"
    target.mkdir()
    (target / archive.file_name).write_bytes((tmp_path / "site" / archive.file_name).read_bytes())
    assert _is_whole(obtain(archive, target, download=False), tmp_path / "site")
    assert handler.requests == []
    with pytest.raises(ValueError, match="remove it and run again"):
        obtain(replace(archive, folder="other", md5="0" * 32), target, download=False)


def test_an_archive_without_a_file_names_it(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    archive = replace(server[0], files=(*server[0].files, "data_batch_6"))
    with pytest.raises(ValueError, match="has no data_batch_6"):
        obtain(archive, tmp_path / "d", download=True)
    assert not (tmp_path / "d" / FOLDER).exists()


def test_no_server_and_no_permission_to_download(tmp_path: Path, server: tuple[Archive, type[Handler]]) -> None:
    advice = rf"no {FOLDER} in .*To get it, download http.* and put cifar-10-python.tar.gz into {tmp_path}"
    with pytest.raises(ValueError, match="downloading is off") as error:
        load_dataset("CIFAR10", tmp_path / "d", download=False)
    error.match(advice)
    assert not (tmp_path / "d").exists()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        port = httpd.server_port  # free again below: nobody answers there
    with pytest.raises(ValueError, match="refused") as error:
        obtain(replace(server[0], url=f"http://127.0.0.1:{port}/cifar-10-python.tar.gz"), tmp_path / "d", download=True)
    error.match(advice)
