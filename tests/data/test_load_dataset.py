"""The datasets by name: digits and synthetic images; CIFAR-10's files in test_cifar.py."""

import time
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from unlocked.data import DATASETS, Augmentation, ImageDataset, load_dataset
from unlocked.launch.command_line import parse

# What the first version drew: a change of these changes everyone's results.
FIRST_TEST_LABELS = [0, 1, 3, 5, 0, 1, 0, 5, 9, 1]
SYNTHETIC_SUM = 15574402
SYNTHETIC_LABELS = [4, 4, 9, 3, 3, 0, 8, 3, 6, 3]


def _same(a: ImageDataset, b: ImageDataset) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_digits_are_scikit_learns_in_two_stratified_parts() -> None:
    train, test = load_dataset("digits")
    assert (train.image_shape, train.num_classes, train.split, test.split) == ((1, 8, 8), 10, "train", "test")
    assert len(train) + len(test) == 1797
    raw = load_digits()
    expected = sorted(
        (tuple(image.ravel().tolist()), label) for image, label in zip(raw.images, raw.target, strict=True)
    )
    images = torch.cat([train.images, test.images]).double() * (16 / 255)
    labels = torch.cat([train.labels, test.labels])
    found = sorted((tuple(i.ravel().round().tolist()), y) for i, y in zip(images, labels.tolist(), strict=True))
    assert found == expected
    shares = test.labels.bincount() / labels.bincount()
    assert (shares - 0.2).abs().max() < 0.005
    assert train.augmentation == Augmentation()
    pixels = train.images.double() / 255
    assert (train.mean[0], train.std[0]) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()))
    assert (test.mean, test.std) == (train.mean, train.std)


def test_digits_split_is_mixed_and_fixed() -> None:
    """Not the first or last fifth of the files, which come from different writers; and pinned down."""
    test = load_dataset("digits")[1]
    assert _same(test, load_dataset("digits")[1])
    assert test.labels[:10].tolist() == FIRST_TEST_LABELS


def test_synthetic_has_the_size_asked_for_and_is_quick() -> None:
    start = time.perf_counter()
    train, test = load_dataset("synthetic")
    assert time.perf_counter() - start < 10  # about 0.4 s; the bound only catches a loop over images
    assert (len(train), len(test), train.image_shape, train.num_classes) == (50_000, 10_000, (3, 32, 32), 10)
    small, small_test = load_dataset("synthetic", num_train=30, num_test=7, num_classes=4, channels=1, image_size=5)
    assert (len(small), len(small_test), small.image_shape, small.num_classes) == (30, 7, (1, 5, 5), 4)
    wide, _ = load_dataset("synthetic", num_train=3, num_test=1, image_size=(2, 9))
    assert wide.image_shape == (3, 2, 9)
    with pytest.raises(ValueError, match=r"dataset synthetic: image_size is .* got \(2, 0\)"):
        load_dataset("synthetic", image_size=(2, 0))


def test_synthetic_depends_on_its_seed_alone_and_a_larger_set_has_images_of_the_same_classes() -> None:
    train, test = load_dataset("synthetic", num_train=40, num_test=40)
    assert _same(train, load_dataset("synthetic", num_train=40, num_test=5)[0])
    assert not torch.equal(train.images, test.images)
    assert not torch.equal(train.images, load_dataset("synthetic", num_train=40, seed=1)[0].images)
    assert train.images.sum().item() == SYNTHETIC_SUM
    assert train.labels[:10].tolist() == SYNTHETIC_LABELS


def test_synthetic_can_be_learnt_but_not_from_one_pixel() -> None:
    """The nearest class mean of the training set finds most test labels."""
    train, test = load_dataset("synthetic", num_train=2000, num_test=500)
    x, y = train.images.flatten(1).float(), test.images.flatten(1).float()
    means = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(y, means).argmin(1) == test.labels).float().mean().item()
    assert accuracy > 0.8
    pixel_accuracy = (torch.cdist(y[:, :1], means[:, :1]).argmin(1) == test.labels).float().mean().item()
    assert pixel_accuracy < 0.4


@pytest.mark.parametrize("name", ["cifar10", "SVHN", ""])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=f"valid: {', '.join(DATASETS)}"):
        load_dataset(name)


def test_the_command_lines_help_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"], default_engine="sequential")
    words = capsys.readouterr().out.replace(",", " ").split()
    assert set(DATASETS) <= set(words)
    assert {"MNIST", "FashionMNIST", "CIFAR100AUG", "IMAGENETTE_BASIC", "TinyIMAGENET", "VWW", "folder"} <= set(
        DATASETS
    )


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "CIFAR100", "IMAGENETTE", "TinyIMAGENET", "VWW", "folder"])
def test_what_is_missing_is_said_with_where_to_put_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}") as error:
        load_dataset(name, tmp_path, download=False)
    error.match("To get it, download http|expected all2014|DIR/train/CLASS")
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'digits' has no option num_train; valid: none"):
        load_dataset("digits", num_train=3)
    with pytest.raises(
        ValueError, match="no option size; valid: num_train, num_test, num_classes, channels, image_size"
    ):
        load_dataset("synthetic", size=3)
    with pytest.raises(ValueError, match="num_test is a positive integer, got 0"):
        load_dataset("synthetic", num_test=0)
    with pytest.raises(ValueError, match="'CIFAR10' has no option seed"):
        load_dataset("CIFAR10", tmp_path, seed=3)


def test_augmentation_is_for_the_training_set() -> None:
    train, test = load_dataset("digits", augmentation=Augmentation(crop_padding=1))
    assert (train.augmentation, test.augmentation) == (Augmentation(crop_padding=1), Augmentation())
