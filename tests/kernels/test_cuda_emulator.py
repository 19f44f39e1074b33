"""The emulator finds what it is there to find: each fault is planted in a copy of the kernels' sources."""

import ctypes
import math

import pytest
import torch
from cuda_on_cpu import emulation

from unlocked.kernels import cuda, reference
from unlocked.kernels.cuda import norm_act

pytestmark = pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "it can")

# File, what stands there, what is planted instead, what the emulator says. All in files that compile quickly.
PLANTED = {
    "missing barrier": (
        "head_sums.cu",
        "sums_s[warp][lane] = sum;\n  __syncthreads();",
        "sums_s[warp][lane] = sum;",
        r"race: (reads|writes) shared memory that .* has (written|read) \(kernel head_sums_kernel, block",
    ),
    "read one too far": (
        "head_sums.cu",
        "image < a.batch; image += kHeadThreads",
        "image <= a.batch; image += kHeadThreads",
        "reads outside of every tensor and of shared memory",
    ),
    "write one too far": (
        "head_sums.cu",
        "if (warp == 0 && entry < entries) {",
        "if (warp == 0 && entry <= entries) {",
        "writes outside of every tensor and of shared memory",
    ),
    "index beyond a shared array": (
        "head_sums.cu",
        "for (int w = 1; w < kHeadWarps; ++w) {\n        loss",
        "for (int w = 1; w <= kHeadWarps; ++w) {\n        loss",
        r"an index beyond its array at \S*head_sums.cu:\d+",
    ),
    "two blocks write one place": (
        "head_sums.cu",
        "(static_cast<int64_t>(blockIdx.x) - 1) * kWarp + lane",
        "lane",
        "race: writes a tensor's memory that thread .* has written",
    ),
    "two barriers for one": (
        "head_sums.cu",
        "sums_s[warp][lane] = sum;\n  __syncthreads();",
        "sums_s[warp][lane] = sum;\n  if (lane)\n    __syncthreads();\n  else\n    __syncthreads();",
        r"threads wait at different barriers: \S*head_sums.cu:\d+ and \S*head_sums.cu:\d+",
    ),
    "shuffle of half a warp": (
        "head_sums.cu",
        "hits = warp_sum(hits);",
        "if (lane < 16) hits = warp_sum(hits);",
        "threads wait for ever",
    ),
    "grid too high": (
        "head_sums.cu",
        "static_cast<unsigned>((a.rows + kBasisRows - 1) / kBasisRows));",
        "65536u);",
        "a grid or a block that CUDA refuses",
    ),
    "sum beyond its type": (
        "head_sums.cu",
        "fives += a.hits[image] >> 1;",
        "fives += 0x7fffffff;\n      fives += 1;",
        r"an addition beyond its type at \S*head_sums.cu",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_fault_is_found(fault: str) -> None:
    file, there, instead, text = PLANTED[fault]
    sources = emulation.kernel_sources()
    assert sources[file].count(there) == 1
    sources[file] = sources[file].replace(there, instead)
    with emulation.emulated(2, kernels=emulation.build_kernels(sources)), pytest.raises(RuntimeError, match=text):
        _heads()


def test_nothing_is_found_in_the_sources_as_they_are() -> None:
    for seed in range(3):
        with emulation.emulated(2, seed=seed):
            _heads()


def _heads() -> None:
    """Scores alone, and a head with every sum: a modulation of two blocks, the basis's gradient."""
    generator = torch.Generator().manual_seed(0)
    latents, labels = torch.randn(5, 12, generator=generator), torch.arange(5)
    modulation = torch.randn(7, 9, generator=generator)
    cuda.local_head(latents, labels, reference.make_basis(7, 12), modulation, basis_gradient=True)
    cuda.local_head(latents, labels, None)


def test_shared_memory_starts_as_nan() -> None:
    file, there = "head_sums.cu", "      loss_s[warp] = loss;\n"
    sources = emulation.kernel_sources()
    sources[file] = sources[file].replace(there, "      if (warp != 3) loss_s[warp] = loss;\n")
    with emulation.emulated(2, kernels=emulation.build_kernels(sources)):
        assert cuda.local_head(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), None).loss_sum.isnan()


def test_more_shared_memory_than_usual_must_be_asked_for() -> None:
    library, _ = emulation.load(emulation.build_kernels())
    refused, most = 1, 227 * 1024  # cudaErrorInvalidValue; of an H100
    with emulation.emulated(2):
        asked = [(48 * 1024, 0), (48 * 1024 + 1, 0), (most, most), (most + 1, most + 1)]
        assert [library.launch_empty(*sizes) for sizes in asked] == [0, refused, 0, refused]


def test_misaligned_vector_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_act, "vector_width", lambda *_: 4)
    unaligned = torch.randn(4 * 6 * 6 * 8 + 1)[1:].view(4, 6, 6, 8).permute(0, 3, 1, 2)
    vectors = torch.ones(4, 8).unbind()
    with emulation.emulated(2), pytest.raises(RuntimeError, match=r"a misaligned or null address at \S*cuda_runtime.h"):
        cuda.norm_act_forward(unaligned, *vectors, latent_size=3)


@pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_conversions_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    library, _ = emulation.load(emulation.build_kernels())
    widen, narrow = getattr(library, f"{name}_to_float"), getattr(library, f"float_to_{name}")
    widen.restype, narrow.argtypes = ctypes.c_float, [ctypes.c_float]
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = bits.view(dtype).float()
    assert all(
        widen(b & 0xFFFF) == w or (math.isnan(w) and math.isnan(widen(b & 0xFFFF)))
        for b, w in zip(bits.tolist(), wide.tolist(), strict=True)
    )
    finite = wide[wide.isfinite()].sort().values
    between = (finite[:-1].double() + finite[1:].double()).float() / 2  # ties, then their neighbours, then the ends
    near = [torch.nextafter(between, torch.tensor(x)) for x in (math.inf, -math.inf)]
    ends = torch.tensor([math.inf, -math.inf, 65519.0, 65520.0, 1e30, -1e30, 1e-40, 0.0, -0.0])
    for value in torch.cat([between[::7], near[0][::7], near[1][::7], ends]):
        assert narrow(value.item()) == value.to(dtype).view(torch.int16).item() & 0xFFFF, value
