"""The CUDA input operation has the bits of the reference. On a GPU or emulated."""

from typing import Any

import pytest
import torch
from cuda_cases import resident_images

from unlocked.kernels import cuda, images


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (2, 5, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"flip": True},
        {"crop_padding": 4},
        {"flip": True, "crop_padding": 2, "erase_probability": 0.5},
        {"erase_probability": 1.0},
    ],
)
def test_bits_of_the_reference(shape: tuple[int, int, int], options: dict[str, Any], cuda_device: str) -> None:
    data = resident_images(60, shape)
    options = {**options, "seed": -(2**40) - 3}
    boxes = images.make_erase_boxes(*shape[1:]) if "erase_probability" in options else None
    wanted = images.load_batch(**data, size=40, erase_boxes=boxes, **options)
    given = {name: tensor.to(cuda_device) for name, tensor in data.items()}
    boxes = None if boxes is None else boxes.to(cuda_device)
    slot = torch.empty(40, *shape, device=cuda_device).to(memory_format=torch.channels_last)
    for out in (None, (slot, torch.empty(40, dtype=torch.int64, device=cuda_device))):
        got = cuda.load_batch(**given, size=40, erase_boxes=boxes, **options, out=out)
        assert out is None or got[0] is slot
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got[0].cpu(), wanted[0])
        assert torch.equal(got[1].cpu(), wanted[1])


def test_past_the_end_is_seen(cuda_device: str) -> None:
    data = {name: tensor.to(cuda_device) for name, tensor in resident_images(20, (3, 4, 4)).items()}
    data["order"] = torch.cat([data["order"], data["order"]])[:20]  # what lies behind it would be valid
    data["start"].fill_(15)
    pixels, labels = cuda.load_batch(**data, size=8, seed=0)
    assert (labels[5:] == -1).all()
    assert pixels[5:].isnan().all()
    assert not pixels[:5].isnan().any()
