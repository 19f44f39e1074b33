"""load_batch: the plain PyTorch version against a loop over samples and pixels, the Triton kernel bit for bit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.kernels import images as reference
from unlocked.kernels.images import ERASE_BOXES, make_erase_boxes
from unlocked.kernels.philox import Purpose, keyed_uniform

SEED = 2**33 + 5
NUM_IMAGES = 23


def _data(shape: tuple[int, int, int], device: str = "cpu") -> dict[str, Any]:
    """The arguments of load_batch that describe a data set of NUM_IMAGES random images."""
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = {
        "images": torch.randint(0, 256, (NUM_IMAGES, *shape), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(0, 10, (NUM_IMAGES,), generator=generator),
        "order": torch.randperm(NUM_IMAGES, generator=generator),
        "mean": torch.rand(shape[0], generator=generator) * 40 + 100,
        "inv_std": 1 / (torch.rand(shape[0], generator=generator) * 30 + 40),
        "epoch": torch.tensor(3),
        "start": torch.tensor(4),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()} | {"seed": SEED}


def _loop(
    data: dict[str, Any], size: int, flip: bool, padding: int, probability: float, boxes: Tensor | None
) -> Tensor:
    """One sample, one pixel after the other, in float32 scalars of numpy."""
    _, channels, height, width = data["images"].shape
    images, mean, inv_std = data["images"].numpy(), data["mean"].numpy(), data["inv_std"].numpy()
    result = np.zeros((size, channels, height, width), dtype=np.float32)
    for row in range(size):
        sample = int(data["order"][int(data["start"]) + row])
        counter = torch.tensor(sample)
        crop = keyed_uniform(SEED, Purpose.AUGMENT, counter, int(data["epoch"]), 0).tolist()
        erase = keyed_uniform(SEED, Purpose.AUGMENT, counter, int(data["epoch"]), 1).tolist()
        top, left = (math.floor(np.float32(u) * np.float32(2 * padding + 1)) - padding for u in crop[1:3])
        mirrored = flip and crop[0] < 0.5
        box = (0, 0)
        if boxes is not None and erase[0] < probability:
            box = tuple(boxes[math.floor(erase[1] * ERASE_BOXES)].tolist())
        box_top = math.floor(np.float32(erase[2]) * np.float32(height - box[0] + 1))
        box_left = math.floor(np.float32(erase[3]) * np.float32(width - box[1] + 1))
        for i in range(height):
            for j in range(width):
                if box_top <= i < box_top + box[0] and box_left <= j < box_left + box[1]:
                    continue
                y, x = i + top, (width - 1 - j if mirrored else j) + left
                inside = 0 <= y < height and 0 <= x < width
                pixel = images[sample, :, y, x].astype(np.float32) if inside else np.zeros(channels, np.float32)
                result[row, :, i, j] = (pixel - mean) * inv_std
    return torch.from_numpy(result)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 4),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_reference_is_the_loop_over_samples_and_pixels(
    shape: tuple[int, int, int], size: int, flip: bool, padding: int, probability: float
) -> None:
    data = _data(shape)
    boxes = make_erase_boxes(*shape[1:]) if probability else None
    options: dict[str, Any] = {"flip": flip, "crop_padding": padding, "erase_probability": probability}
    batch, labels = reference.load_batch(size=size, erase_boxes=boxes, **options, **data)
    assert torch.equal(batch, _loop(data, size, flip, padding, probability, boxes))
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, data["labels"][data["order"]][4 : 4 + size])


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"flip": True}, id="flip"),
    pytest.param({"crop_padding": 2}, id="crop"),
    pytest.param({"flip": True, "crop_padding": 3, "erase_probability": 0.5}, id="all"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 6, 9), (2, 1, 5), (3, 20, 19)], ids=str)
def test_triton_gives_the_same_bits(shape: tuple[int, int, int], options: dict[str, Any], kernel_device: str) -> None:
    triton_images = pytest.importorskip("unlocked.kernels.triton.images")
    if options.get("erase_probability"):
        options = {**options, "erase_boxes": make_erase_boxes(*shape[1:])}
    expected, labels = reference.load_batch(size=7, **options, **_data(shape))
    if "erase_boxes" in options:
        options = {**options, "erase_boxes": make_erase_boxes(*shape[1:], kernel_device)}
    out = (
        torch.full((7, *shape), math.nan, device=kernel_device).to(memory_format=torch.channels_last),
        torch.full((7,), -1, device=kernel_device),
    )
    result = triton_images.load_batch(size=7, out=out, **options, **_data(shape, kernel_device))
    assert result[0] is out[0]
    assert result[1] is out[1]
    assert torch.equal(out[0].cpu().view(torch.int32), expected.view(torch.int32))
    assert torch.equal(out[1].cpu(), labels)


def test_bfloat16_images_are_the_rounded_ones(kernel_device: str) -> None:
    shape, options = (3, 8, 8), {"flip": True, "crop_padding": 2}
    expected, labels = reference.load_batch(size=7, **options, **_data(shape))
    out = torch.empty((7, *shape), dtype=torch.bfloat16, memory_format=torch.channels_last), torch.empty_like(labels)
    result = reference.load_batch(size=7, out=out, **options, **_data(shape))
    assert result[0] is out[0]
    assert torch.equal(out[0], expected.bfloat16())
    triton_images = pytest.importorskip("unlocked.kernels.triton.images")
    moved = out[0].to(kernel_device).zero_(), out[1].to(kernel_device).zero_()
    triton_images.load_batch(size=7, out=moved, **options, **_data(shape, kernel_device))
    if kernel_device == "cuda":
        assert torch.equal(moved[0].cpu(), out[0])
    else:  # the interpreter cuts bits off where a device rounds
        torch.testing.assert_close(moved[0], out[0], rtol=2**-7, atol=0)
    assert torch.equal(moved[1].cpu(), labels)


def test_triton_shows_a_micro_batch_beyond_the_order(kernel_device: str) -> None:
    """The device can't raise without a wait: rows that do not exist are NaN with label -1."""
    triton_images = pytest.importorskip("unlocked.kernels.triton.images")
    data = _data((1, 4, 4), kernel_device)
    data["start"].fill_(NUM_IMAGES - 2)
    batch, labels = triton_images.load_batch(size=4, **data)
    assert batch.isnan().all(dim=(1, 2, 3)).tolist() == [False, False, True, True]
    assert not batch[:2].isnan().any()
    assert labels[2:].tolist() == [-1, -1]
    assert (labels[:2] >= 0).all()


def test_a_sample_is_augmented_alike_in_any_micro_batch() -> None:
    data = _data((3, 6, 6))
    whole, _ = reference.load_batch(size=8, flip=True, crop_padding=2, **data)
    data["start"] += 3
    part, _ = reference.load_batch(size=5, flip=True, crop_padding=2, **data)
    assert torch.equal(part, whole[3:])
    data["epoch"] += 1
    other, _ = reference.load_batch(size=5, flip=True, crop_padding=2, **data)
    assert not torch.equal(other, part)


def test_flips_and_crops_have_their_probabilities() -> None:
    """Each pixel holds its own column; the draws are fixed, the bounds five standard deviations."""
    count, padding = 4000, 2
    columns = torch.arange(10, 20, dtype=torch.uint8).expand(count, 1, 10, 10).contiguous()
    order, zero = torch.arange(count), torch.zeros((), dtype=torch.int64)
    batch, _ = reference.load_batch(
        columns, order, order, zero, count, mean=torch.zeros(1), inv_std=torch.ones(1), seed=1, epoch=zero,
        flip=True, crop_padding=padding,
    )  # fmt: skip
    middle = batch[:, 0, 5]
    flipped = middle[:, 5] < middle[:, 4]
    assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / count**0.5
    shift = torch.where(flipped, middle[:, 4], middle[:, 5]) - 15
    shares = torch.bincount((shift + padding).long(), minlength=2 * padding + 1) / count
    assert shares.shape == (5,)
    assert (shares - 0.2).abs().max() < 5 * (0.2 * 0.8 / count) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 20), (3, 2), (1, 1)])
def test_erase_boxes_follow_random_erasing(height: int, width: int) -> None:
    """Against the rule of torchvision's RandomErasing.get_params, row by row, with the same draws."""
    table = make_erase_boxes(height, width)
    assert table.shape == (ERASE_BOXES, 2)
    assert table.dtype == torch.int32
    tries = [keyed_uniform(0, Purpose.AUGMENT, torch.arange(200), attempt, 2).tolist() for attempt in range(10)]
    for row in range(200):
        expected = [0, 0]
        for attempt in range(10):
            u = tries[attempt][row]
            area = height * width * (0.02 + (0.33 - 0.02) * u[0])
            ratio = math.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * u[1])
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < height and w < width:
                expected = [h, w]
                break
        assert table[row].tolist() == expected
    if height == 32:
        share = table.prod(dim=1) / (height * width)
        assert share.mean().item() == pytest.approx(0.175, abs=0.01)


BAD = [
    ({"images": torch.zeros(4, 1, 2, 2)}, "images must be contiguous uint8"),
    ({"images": torch.zeros(4, 2, 2, 1, dtype=torch.uint8).permute(0, 3, 1, 2)[:, :, :, :1]}, "not contiguous"),
    ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be contiguous torch.int64 \[23\]"),
    ({"labels": torch.zeros(NUM_IMAGES, dtype=torch.int32)}, "labels must be"),
    ({"order": torch.zeros(4, 2, dtype=torch.int64)}, "order must be"),
    ({"start": torch.zeros(1, dtype=torch.int64)}, "start must be"),
    ({"start": torch.tensor(-1)}, "start -1 with size 4"),
    ({"start": torch.tensor(20)}, "last valid start is 19"),
    ({"epoch": torch.tensor(0.0)}, "epoch must be"),
    ({"mean": torch.zeros(2)}, "mean must be"),
    ({"inv_std": torch.zeros(1, dtype=torch.float64)}, "inv_std must be"),
    ({"size": 0}, "size must be in 1 .. 23"),
    ({"size": 24}, "size must be in 1 .. 23"),
    ({"crop_padding": -1}, "crop_padding must be at least 0"),
    ({"erase_probability": 1.5}, "erase_probability must be in 0 .. 1"),
    ({"erase_probability": 0.5}, "needs erase_boxes"),
    ({"erase_probability": 0.5, "erase_boxes": torch.zeros(4, 2, dtype=torch.int32)}, "erase_boxes must be"),
    ({"out": (torch.zeros(4, 1, 2, 3), torch.zeros(4, dtype=torch.int64))}, r"out\[0\] must be float32 or bfloat16"),
    ({"out": (torch.zeros(4, 1, 2, 2), torch.zeros(4))}, r"out\[1\] must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.load_batch(**{"size": 4, **_data((1, 2, 2)), **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["images", "triton.images"])
def test_a_captured_graph_follows_start_and_epoch(backend: str) -> None:
    module = pytest.importorskip(f"unlocked.kernels.{backend}")
    shape = (3, 32, 32)
    data = _data(shape, "cuda")
    options = {"flip": True, "crop_padding": 4, "erase_probability": 0.5}
    boxes = make_erase_boxes(*shape[1:], "cuda")
    module.load_batch(size=5, erase_boxes=boxes, **options, **data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch, labels = module.load_batch(size=5, erase_boxes=boxes, **options, **data)
        data["start"] += 5
    expected_data = _data(shape)
    data["start"].zero_()
    for epoch in range(2):
        data["epoch"].fill_(epoch)
        expected_data["epoch"].fill_(epoch)
        data["start"].zero_()
        for step in range(4):
            graph.replay()
            expected_data["start"].fill_(5 * step)
            expected = reference.load_batch(
                size=5, erase_boxes=make_erase_boxes(*shape[1:]), **options, **expected_data
            )
            assert torch.equal(batch.cpu(), expected[0])
            assert torch.equal(labels.cpu(), expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 6e9, reason="needs a CUDA device with 6 GB free"
)
def test_data_sets_of_more_than_two_to_the_31_bytes() -> None:
    triton_images = pytest.importorskip("unlocked.kernels.triton.images")
    count = 2**31 // 3072 + 1000
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8, device="cuda")
    images[-3:] = torch.arange(1, 4, dtype=torch.uint8, device="cuda")[:, None, None, None]
    labels = torch.arange(count, device="cuda")
    zero = torch.zeros((), dtype=torch.int64, device="cuda")
    unit = {"mean": torch.zeros(3, device="cuda"), "inv_std": torch.ones(3, device="cuda")}
    batch, targets = triton_images.load_batch(images, labels, labels[-3:].clone(), zero, 3, seed=0, epoch=zero, **unit)
    assert batch[:, 2, 31, 31].tolist() == [1.0, 2.0, 3.0]
    assert targets.tolist() == [count - 3, count - 2, count - 1]
