"""The joined weight gradient in CUDA C++ against float64 autograd of the layer as it is. On a GPU or emulated."""

import ctypes
from typing import Any

import pytest
import torch
from cuda_on_cpu import emulation
from joined_cases import CASES, OFF, PADDED, SLOPE, Case, Layer, check, layer_of

from unlocked.kernels import cuda
from unlocked.kernels.cuda import weight_grad

# One that no other case has: more columns than a tile, more channels than a chunk, several steps in each split.
LONG = Case((3, 8, 8, 8), 40, (3, 3), 2, PADDED)


def _gradients(case: Case, layer: Layer) -> tuple[torch.Tensor, ...]:
    options = {"latent_size": case.latent_size, "negative_slope": SLOPE, **case.options}
    return cuda.norm_act_weight_grad(*layer.arguments, **options)


@pytest.mark.parametrize("name", CASES)
def test_is_the_gradient_that_autograd_finds(name: str, cuda_device: str) -> None:
    for channels_last in (True, False):
        layer = layer_of(CASES[name], cuda_device, channels_last=channels_last)
        check(_gradients(CASES[name], layer), layer, OFF[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, cuda_device: str) -> None:
    layer = layer_of(CASES["three colours"], cuda_device, dtype)
    check(_gradients(CASES["three colours"], layer), layer, OFF[dtype])


def test_several_steps_in_each_split(cuda_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_grad, "_BLOCKS", 12)
    layer = layer_of(LONG, cuda_device)
    found = _gradients(LONG, layer)
    check(found, layer, OFF[torch.float32])
    assert all(torch.equal(a, b) for a, b in zip(_gradients(LONG, layer), found, strict=True))


@pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "it can")
def test_both_sides_lay_a_convolution_out_alike() -> None:
    library, _ = emulation.load(emulation.build_kernels())
    assert library.unlocked_convolution_bytes(0) == ctypes.sizeof(weight_grad.Convolution)


PLANTED = {
    "no barrier before the tile is read": (
        "    __syncthreads();\n#pragma unroll 8\n    for (int pixel = 0",
        "#pragma unroll 8\n    for (int pixel = 0",
        r"race: (reads|writes) shared memory",
    ),
    "no barrier before the tile is filled again": (
        "    __syncthreads();\n  }\n#pragma unroll\n  for (int m = 0",
        "  }\n#pragma unroll\n  for (int m = 0",
        r"race: (reads|writes) shared memory",
    ),
    "a pixel too far": (
        "pixel < end && column < columns",
        "pixel <= end && column < columns",
        "outside of every tensor",
    ),
    "a line too far": ("row >= c.source_height", "row > c.source_height", "outside of every tensor"),
    "one place for two splits": ("(blockIdx.z * columns + column)", "column", "race: writes a tensor's memory"),
}


@pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "it can")
@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there, instead, text = PLANTED[fault]
    sources = emulation.kernel_sources()
    assert sources["weight_grad.cu"].count(there) == 1
    sources["weight_grad.cu"] = sources["weight_grad.cu"].replace(there, instead)
    monkeypatch.setattr(weight_grad, "_BLOCKS", 2)
    case = Case((3, 2, 6, 6), 3, (3, 3), 2, PADDED)
    with emulation.emulated(2, kernels=emulation.build_kernels(sources)), pytest.raises(RuntimeError, match=text):
        _gradients(case, layer_of(case, "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(3, 1, 3, 3)}, "no convolution of one group"),
        ({"source": torch.zeros(2, 2, 4)}, "source must be non-empty"),
        ({"source": torch.zeros(2, 2, 4, 4).half()}, "source must be torch.float32"),
        ({"latent_size": 3}, "does not tile"),
        ({"mask_sums": torch.zeros(2, 3)}, "mask_sums must be"),
        ({"mean": torch.zeros(4)}, "mean must be"),
        ({}, "must be on a CUDA device"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    sums = dict.fromkeys(("latents_grad", "mask_sums", "mask_xhat_sums"), torch.zeros(2, 12))
    vectors = dict.fromkeys(("mean", "rstd", "weight", "bias"), torch.ones(3))
    tensors = {"conv": torch.zeros(2, 3, 4, 4), "source": torch.zeros(2, 2, 4, 4), "kernel": torch.zeros(3, 2, 3, 3)}
    with pytest.raises(ValueError, match=message):
        cuda.norm_act_weight_grad(**{**sums, **vectors, **tensors, "latent_size": 2, **PADDED} | change)
