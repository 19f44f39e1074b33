"""ImageDataset and the order of an epoch."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from unlocked.data import Augmentation, ImageDataset, epoch_order
from unlocked.data.dataset import channel_statistics
from unlocked.kernels.images import load_batch
from unlocked.kernels.philox import Purpose, keyed_uniform, philox4x32
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.runtime.input import as_dataset


def _dataset(**changes: Any) -> ImageDataset:
    fields: dict[str, Any] = {
        "name": "mine",
        "split": "train",
        "images": torch.randint(0, 256, (6, 2, 8, 8), dtype=torch.uint8),
        "labels": torch.arange(6) % 3,
        "num_classes": 3,
        "mean": (0.5, 0.25),
        "std": (0.2, 0.1),
    }
    return ImageDataset(**(fields | changes))


def test_sizes_and_names() -> None:
    data = _dataset()
    assert (len(data), data.image_shape, data.classes) == (6, (2, 8, 8), ("0", "1", "2"))


def test_names_of_classes_are_numbers_unless_they_are_given() -> None:
    names = _dataset(num_classes=4).classes
    assert (names, names[-1], names[1:3], len(names)) == (("0", "1", "2", "3"), "3", ("1", "2"), 4)
    assert names == _dataset(num_classes=4).classes != _dataset().classes
    assert names != ("0", "1", "2", "4")
    assert replace(_dataset(), num_classes=5).classes == ("0", "1", "2", "3", "4")
    assert replace(_dataset(classes=("a", "b", "c")), name="other").classes == ("a", "b", "c")


def test_a_large_label_takes_no_memory() -> None:
    labels = torch.tensor([0, 2**40])
    with at_most(2**30):
        data = ImageDataset.from_tensors(torch.zeros(2, 3), labels, 2**40 + 1)
        assert (len(data.classes), data.classes[2**40]) == (2**40 + 1, str(2**40))
        assert (as_dataset((torch.zeros(2, 3), labels), "train")).num_classes == 2**40 + 1
        most = torch.tensor([0, 2**63 - 1])
        trainer = Trainer([nn.Linear(3, 10)], rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
        with pytest.raises(ValueError, match=r"gives \(10,\) per sample, but the data has 9223372036854775808 classes"):
            trainer.fit((torch.zeros(2, 3), most), epochs=1, batch_size=2)


@pytest.mark.parametrize("labels", [torch.tensor([0.0, 1.5]), torch.tensor([True, False])])
def test_targets_that_fit_no_task_are_refused(labels: torch.Tensor) -> None:
    trainer = Trainer([nn.Linear(3, 10)], rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    name = str(labels.dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"the targets are {name} \[N\], which fits no task"):
        trainer.fit((torch.zeros(2, 3), labels), epochs=1, batch_size=2)


def test_a_target_of_nan_is_refused() -> None:
    trainer = Trainer([nn.Linear(3, 1)], rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"the train data: targets hold nan, at \[1\]"):
        trainer.fit((torch.zeros(2, 3), torch.tensor([0.0, float("nan")])), epochs=1, batch_size=2)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """A limit on how many bytes more this process may take, where its size can be asked (Linux)."""
    statm = Path("/proc/self/statm")
    before = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_batch_made_with_its_options_is_normalised() -> None:
    data = _dataset()
    zero = torch.zeros((), dtype=torch.int64)
    batch, labels = load_batch(
        data.images, data.labels, torch.arange(6), zero, 4, seed=0, epoch=zero, **data.batch_options()
    )
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (data.mean, data.std))
    expected = (data.images[:4].double() / 255 - mean) / std
    torch.testing.assert_close(batch.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, data.labels[:4])


def test_augmentation_reaches_the_batch_options() -> None:
    assert _dataset().batch_options()["erase_boxes"] is None
    options = _dataset(augmentation=Augmentation(flip=True, crop_padding=2, erase_probability=0.5)).batch_options()
    assert (options["flip"], options["crop_padding"], options["erase_probability"]) == (True, 2, 0.5)
    assert options["erase_boxes"].amax() < 8


def test_a_margin_is_cut_off_in_the_middle_or_at_random() -> None:
    """Against slices, image by image, at the places that the draws name."""
    plain = _dataset(margin=2, mean=(), std=())
    assert plain.image_shape == (2, 4, 4)
    zero, epoch = torch.zeros((), dtype=torch.int64), torch.tensor(3)

    def read(data: ImageDataset) -> torch.Tensor:
        made, _ = load_batch(
            data.images, data.labels, torch.arange(6), zero, 6, seed=5, epoch=epoch, **data.batch_options()
        )
        return (made * 255).round().to(torch.uint8)

    assert torch.equal(read(plain), plain.images[:, :, 2:6, 2:6])
    draws = keyed_uniform(5, Purpose.AUGMENT, torch.arange(6), 3)
    for flip in (False, True):
        got = read(
            _dataset(
                images=plain.images, margin=2, mean=(), std=(), augmentation=Augmentation(flip=flip, crop_margin=True)
            )
        )
        for image, made, (u0, u1, u2, _) in zip(plain.images, got, draws.tolist(), strict=True):
            top, left = int(u1 * 5), int(u2 * 5)
            cut = image[:, top : top + 4, left : left + 4]
            assert torch.equal(made, cut.flip(2) if flip and u0 < 0.5 else cut)
    flipped = read(_dataset(images=plain.images, margin=2, mean=(), std=(), augmentation=Augmentation(flip=True)))
    middle = plain.images[:, :, 2:6, 2:6]
    assert torch.equal(flipped, torch.where((draws[:, 0] < 0.5)[:, None, None, None], middle.flip(3), middle))


def test_to_keeps_everything_else() -> None:
    data = _dataset(augmentation=Augmentation(flip=True))
    assert data.to("cpu") is data
    if torch.cuda.is_available():
        moved = data.to("cuda")
        assert moved.images.is_cuda
        assert moved.mean255.is_cuda
        assert (moved.augmentation, moved.mean, moved.classes) == (data.augmentation, data.mean, data.classes)


def test_own_tensors() -> None:
    images = torch.randn(4, 1, 5, 5)
    data = ImageDataset.from_tensors(images, torch.zeros(4, dtype=torch.int64), 2, flip=True)
    assert data.images is images
    assert data.augmentation == Augmentation(flip=True)
    assert torch.equal((images - data.mean255) * data.inv_std255, images)
    bytes_ = ImageDataset.from_tensors(torch.full((4, 1, 5, 5), 51, dtype=torch.uint8), data.labels, 2)
    scaled = (bytes_.images.float() - bytes_.mean255) * bytes_.inv_std255
    torch.testing.assert_close(scaled, torch.full((4, 1, 5, 5), 0.2))


def test_tokens_are_samples_too() -> None:
    tokens, labels = torch.randint(0, 50, (4, 12)), torch.zeros(4, dtype=torch.int64)
    data = ImageDataset.from_tensors(tokens, labels, 2)
    assert (data.image_shape, data.images.dtype) == ((12,), torch.int64)
    for flipped in (tokens, torch.zeros(4, 1, 5, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"only images \[N, C, H, W\] can be flipped, got torch.int64"):
            ImageDataset.from_tensors(flipped, labels, 2, flip=True)


def test_images_become_contiguous() -> None:
    images = torch.randint(0, 256, (6, 8, 8, 2), dtype=torch.uint8).permute(0, 3, 1, 2)
    data = _dataset(images=images)
    assert data.images.is_contiguous()
    assert torch.equal(data.images, images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(6, 8, 8, dtype=torch.uint8)}, r"shape \[N, C, H, W\].*got \[6, 8, 8\]"),
        ({"images": torch.zeros(0, 2, 8, 8, dtype=torch.uint8)}, "no size 0"),
        (
            {"images": torch.zeros(6, 2, 8, 8, dtype=torch.float64)},
            "uint8 or float32 and tokens int64, got torch.float64",
        ),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"\[6\], one for each image, got torch.int64 \[5\]"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "got torch.int32"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 1])}, r"in \[0, 2\], got values from 0 to 3"),
        ({"labels": torch.tensor([0, 1, -1, 2, 0, 1])}, "got values from -1 to 2"),
        ({"margin": 4}, r"a margin leaves some of uint8 images \[6, 2, 8, 8\], got 4"),
        ({"augmentation": Augmentation(crop_margin=True)}, "crop_margin is for images that are stored with a margin"),
        ({"classes": ("a", "b")}, "num_classes is 3, but there are 2 class names"),
        ({"mean": (0.5,)}, "mean has one value for each of 2 channels, got 1"),
        ({"std": (0.1, 0.0)}, "std is positive"),
        ({"images": torch.zeros(6, 2, 8, 8)}, "leave mean and std out"),
        (
            {"images": torch.zeros(6, 2, 8, 8), "mean": (), "std": (), "augmentation": Augmentation(crop_padding=1)},
            "can only be flipped",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"dataset mine \(train\): .*{message}"):
        _dataset(**changes)


@pytest.mark.parametrize(
    "options", [{"crop_padding": -1}, {"erase_probability": 1.1}, {"crop_padding": 2, "crop_margin": True}]
)
def test_augmentation_is_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Augmentation(**options)


def test_channel_statistics() -> None:
    images = torch.randint(0, 256, (50, 3, 4, 4), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0), rtol=0, atol=1e-7)


# With 20,000 samples some share their first 24 bits.
@example(n=20_000, seed=0, epoch=0)
@given(n=st.integers(1, 300), seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**32 - 1))
def test_epoch_order_sorts_the_samples_draws(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert order.dtype == torch.int64
    # Straight from the counter, in Python's integers: key (folded seed, purpose), counter (sample, 0, epoch, 0).
    folded = (seed & 0xFFFFFFFF) ^ (((seed >> 32) & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF)
    counter = (torch.arange(n), torch.tensor(0), torch.tensor(epoch), torch.tensor(0))
    words = philox4x32(counter, (torch.tensor(folded), torch.tensor(int(Purpose.SHUFFLE))))
    draws = [(int(a) >> 8, int(b) >> 8, i) for i, (a, b) in enumerate(zip(words[0], words[1], strict=True))]
    assert order.tolist() == [i for *_, i in sorted(draws)]


def test_epoch_order_depends_on_every_part_of_its_key() -> None:
    orders = [
        epoch_order(100, 0, 0),
        epoch_order(100, 1, 0),
        epoch_order(100, 0, 1),
        epoch_order(100, 0, 0, purpose=Purpose.STATISTICS),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(epoch_order(100, 0, torch.tensor(1)), orders[2])


def test_epoch_order_is_even() -> None:
    """Every sample comes to every eighth of the epoch about equally often."""
    n, epochs = 64, 400
    counts = torch.zeros(n, 8)
    for epoch in range(epochs):
        order = epoch_order(n, 0, epoch)
        counts[order, torch.arange(n) // 8] += 1
    chi_square = ((counts - epochs / 8) ** 2 / (epochs / 8)).sum().item()
    freedom = (n - 1) * 7
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
