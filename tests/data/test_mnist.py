"""MNIST's IDX files, written here by their definition, byte for byte."""

import gzip
from pathlib import Path

import pytest
import torch
from dataset_files import idx, mnist_pixels, write_mnist

from unlocked.data import Augmentation, load_dataset, mnist
from unlocked.data.mnist import read_idx


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["{name}/raw", "{name}", "."])
def test_reads_the_official_files_wherever_they_lie(name: str, zipped: bool, below: str, tmp_path: Path) -> None:
    write_mnist(tmp_path / below.format(name=name), zipped=zipped)
    train, test = load_dataset(name, tmp_path, download=False)
    for data, split, count in ((train, "train", 12), (test, "test", 5)):
        assert bytes(data.images.flatten().tolist()) == mnist_pixels(split, count)
        assert data.image_shape == (1, 28, 28)
        assert data.labels.tolist() == [i % 10 for i in range(count)]
    assert train.classes[9] == {"MNIST": "9", "FashionMNIST": "Ankle boot"}[name]
    assert (train.mean, train.std) == {"MNIST": ((0.5,), (0.5,)), "FashionMNIST": ((0.286,), (0.353,))}[name]
    assert train.augmentation == Augmentation(flip=name == "FashionMNIST", crop_padding=4)


GOOD = idx(bytes(12), 12)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "the first bytes none"),
        (b"\0\0\x08", "the first bytes 00 00 08"),
        (b"hello there", "the first bytes 68 65 6c 6c"),
        (b"\0\0\x0d\x01" + GOOD[4:], "the first bytes 00 00 0d 01"),
        (b"\0\0\x08\x03\0\0", "6 bytes"),
        (GOOD[:-1], r"11 values where its header says \[12\]"),
        (GOOD + b"x", r"13 values where its header says \[12\]"),
        (gzip.compress(GOOD, mtime=0)[:-9], "what can't be read .EOFError"),
        (gzip.compress(GOOD, mtime=0)[:12] + b"garbage" + gzip.compress(GOOD, mtime=0)[19:], "what can't be read"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, found: str, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=rf"IDX file {tmp_path}/train-labels-idx1-ubyte is damaged: .*found {found}"):
        load_dataset("MNIST", tmp_path, download=False)


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(bytes(4), 4))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte holds \[5, 28, 28\] and .*labels-idx1-ubyte \[4\]"):
        load_dataset("MNIST", tmp_path, download=False)
    labels.write_bytes(idx(bytes((0, 1, 2, 3, 10)), 5))
    with pytest.raises(ValueError, match="found labels up to 10"):
        load_dataset("MNIST", tmp_path, download=False)


def test_an_array_of_any_dimensions(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(bytes(range(24)), 2, 3, 4))
    assert torch.equal(torch.from_numpy(read_idx(tmp_path / "a")), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


def test_a_file_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mnist, "_MOST_BYTES", 1 << 20)
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(ValueError, match="it unpacks to more than 1,048,576 bytes"):
        mnist.read_idx(path)
