"""The CUDA norm_act against the reference in float64. On a GPU or emulated.

Tolerances as in test_triton_norm_act.py: a few float32 operations per value (2e-6 of the largest), sums of many terms
(2e-5 of the largest), and half a unit in the last place of the output's type.
"""

from typing import Any

import pytest
import torch
from cuda_cases import DTYPES, EPS, MOMENTUM, ROUNDING, SLOPE, assert_near, needs_gpu, norm_act_inputs
from cuda_on_cpu import emulation

from unlocked.kernels import cuda, reference
from unlocked.kernels.cuda import norm_act_geometry

# Shape, latent_size, pool, pool_size.
SMALL: list[tuple[tuple[int, ...], int, str, int]] = [
    ((3, 5, 8, 8), 2, "max", 1),
    ((2, 8, 8, 8), 2, "none", 1),
    ((5, 40, 6, 6), 2, "max", 1),  # windows of 3 x 3: two launches; a chunk of channels that is not full
    ((4, 8, 6, 6), 1, "average", 3),
    ((4, 16, 4, 4), 2, "average", 1),  # one output for four windows
    ((3, 3, 7, 9), 1, "none", 1),
    ((3, 8, 7, 9), 0, "max", 1),
    ((30, 8, 8, 8), 0, "none", 1),
    ((3, 72, 8, 8), 0, "average", 4),
    ((1, 8, 4, 4), 4, "max", 1),  # windows smaller than a cell
    ((1, 1, 20, 24), 1, "max", 1),
    ((2, 64, 2, 2), 1, "none", 1),
    ((7, 33), 33, "none", 1),
    ((300, 16), 16, "none", 1),
    ((1, 3), 0, "none", 1),
]
LAYERS: list[tuple[tuple[int, ...], int, str, int]] = [
    ((64, 32, 32, 32), 4, "max", 1),  # SmallConv
    ((64, 64, 16, 16), 2, "max", 1),
    ((64, 128, 8, 8), 2, "max", 1),
    ((64, 512), 512, "none", 1),
    ((64, 128, 32, 32), 4, "max", 1),  # VGG8
    ((64, 512, 4, 4), 2, "max", 1),
    ((33, 32, 16, 16), 0, "none", 1),  # MobileNetV1
    ((64, 1024, 2, 2), 1, "average", 1),
]


def _check_norm_act(shape: tuple[int, ...], case: dict[str, Any], inputs: dict[str, Any], noise: float = 1.0) -> None:
    """All three norm_act functions against the reference in float64; `noise` scales the tolerances."""
    dtype = inputs["conv"].dtype
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    kept = {name: inputs[name].clone() for name in ("running_mean", "running_var")}
    options = {"momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE, **case}
    actual = cuda.norm_act_forward(**{**inputs, **kept}, **options)
    expected = reference.norm_act_forward(**exact, **options)
    for name, share in (("mean", 2e-6), ("rstd", 2e-6), ("mask_sums", 2e-6), ("mask_xhat_sums", 2e-5)):
        assert_near(name, getattr(actual, name), getattr(expected, name), 2e-5 * noise, share * noise)
    for name in ("output", "latents"):
        assert getattr(actual, name).dtype == dtype
        assert_near(name, getattr(actual, name), getattr(expected, name), ROUNDING[dtype] * noise, 2e-6 * noise)
    for name, vector in kept.items():
        assert_near(name, vector, exact[name], 1e-5 * noise, 2e-6 * noise)

    common = {name: inputs[name] for name in ("conv", "weight", "bias")} | {"mean": actual.mean, "rstd": actual.rstd}
    device = inputs["conv"].device
    generator = torch.Generator().manual_seed(1)
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    calls.append(("norm_act_backward_full", {**common, "activations_grad": grad}, {}))
    if case["latent_size"]:
        for kind in {dtype, torch.float32}:
            given = {"mask_sums": actual.mask_sums, "mask_xhat_sums": actual.mask_xhat_sums}
            given["latents_grad"] = torch.randn(actual.latents.shape, generator=generator).to(device, kind)
            calls.append(("norm_act_backward", common | given, {"latent_size": case["latent_size"]}))
    for name, tensors, options in calls:
        got = getattr(cuda, name)(**tensors, negative_slope=SLOPE, **options)
        wanted = {key: tensor.double() for key, tensor in tensors.items()}
        want = getattr(reference, name)(**wanted, negative_slope=SLOPE, **options)
        assert got[0].stride() == inputs["conv"].stride()
        assert_near(f"{name} conv_grad", got[0], want[0], ROUNDING[dtype] * noise, 1e-5 * noise)
        assert_near(f"{name} weight_grad", got[1], want[1], 2e-5 * noise, 2e-5 * noise)
        assert_near(f"{name} bias_grad", got[2], want[2], 2e-5 * noise, 2e-5 * noise)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), SMALL)
def test_small(
    shape: tuple[int, ...],
    latent_size: int,
    pool: str,
    pool_size: int,
    dtype: torch.dtype,
    channels_last: bool,
    cuda_device: str,
) -> None:
    case = {"latent_size": latent_size, "pool": pool, "pool_size": pool_size}
    _check_norm_act(shape, case, norm_act_inputs(shape, dtype, channels_last, cuda_device))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), LAYERS)
def test_layers(shape: tuple[int, ...], latent_size: int, pool: str, pool_size: int, dtype: torch.dtype) -> None:
    case = {"latent_size": latent_size, "pool": pool, "pool_size": pool_size}
    _check_norm_act(shape, case, norm_act_inputs(shape, dtype, True, "cuda"))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_several_tiles_per_block(pool: str, channels_last: bool, cuda_device: str) -> None:
    """More windows than the blocks of a small device take at once: every loop over a tile's rows goes round again."""
    shape, slots = (60, 8, 8, 8), 32 if channels_last else 256
    cell = (1, 1) if pool == "none" else (2, 2)
    geometry, _ = norm_act_geometry.forward_geometries(shape, channels_last, 4 if channels_last else 1, 2, 4, cell)
    assert geometry.blocks * slots < 60 * 16 * geometry.splits
    case = {"latent_size": 4, "pool": pool, "pool_size": 4}
    _check_norm_act(shape, case, norm_act_inputs(shape, torch.float32, channels_last, cuda_device))


@pytest.mark.parametrize("channels_last", [True, False])
def test_no_bias_of_the_convolution(channels_last: bool, cuda_device: str) -> None:
    inputs = norm_act_inputs((3, 40, 4, 4), torch.float32, channels_last, cuda_device)
    del inputs["conv_bias"]
    _check_norm_act((3, 40, 4, 4), {"latent_size": 2, "pool": "max"}, inputs)


@pytest.mark.skipif(bool(emulation.unavailable()), reason=emulation.unavailable() or "it can")
def test_a_thread_loses_nothing_over_thousands_of_terms() -> None:
    """As 512 channels do at batch 2048: a thread of the full sums adds 4096 terms. All are equal, so that the roundings
    of a plain sum point in one direction."""
    shape = (64, 4, 64, 64)
    conv, grad = (torch.full(shape, x).to(memory_format=torch.channels_last) for x in (1.0, 0.1))
    mean, rstd, weight, bias = (torch.full((4,), x) for x in (0.3, 1.1, 0.5, 1.0))
    given = (grad, conv, mean, rstd, weight, bias)
    with emulation.emulated(1):
        actual = cuda.norm_act_backward_full(*given)
    expected = reference.norm_act_backward_full(*(tensor.double() for tensor in given))
    for got, want in zip(actual[1:], expected[1:], strict=True):
        # Besides the thread's sum, three roundings of a term and those of the sums over 64 threads.
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0.0)


def test_strided_and_unaligned_memory(cuda_device: str) -> None:
    inputs = norm_act_inputs((4, 8, 6, 6), torch.float32, True, cuda_device)
    flat = torch.cat([torch.zeros(1, device=cuda_device), inputs["conv"].permute(0, 2, 3, 1).flatten()])
    unaligned = flat[1:].view(4, 6, 6, 8).permute(0, 3, 1, 2)  # 4 bytes off any 16-byte boundary
    wider = torch.zeros(4, 8, 6, 12, device=cuda_device)
    wider[..., ::2] = inputs["conv"]
    case: dict[str, Any] = {"latent_size": 3, "pool": "max", "momentum": 0.0}
    wanted = cuda.norm_act_forward(**inputs, **case)
    slot = torch.empty(4, 8, 3, 3, device=cuda_device)  # contiguous, where the result is channels-last
    for conv in (unaligned, wider[..., ::2]):
        got = cuda.norm_act_forward(**{**inputs, "conv": conv}, **case, out=slot)
        assert got.output is slot
        assert torch.allclose(got.output, wanted.output, rtol=1e-5, atol=1e-6)
        assert torch.allclose(got.latents, wanted.latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
def test_hard_statistics(channels_last: bool, cuda_device: str) -> None:
    """A mean far above the deviation, a constant channel, an outlier: naive sums of squares lose all digits."""
    inputs = norm_act_inputs((9, 8, 8, 8), torch.float32, channels_last, cuda_device)
    conv = inputs["conv"]
    conv[:, 1] = conv[:, 1] * 0.01 + 100.0
    conv[:, 2] = 3.0
    conv[0, 3, 0, 0] = 1e4
    inputs["bias"][:4] = 9.0  # no value near the kink
    # A mean of 100 held in float32 is off by up to 4e-6, which is 2e-4 of a deviation of 0.02.
    _check_norm_act((9, 8, 8, 8), {"latent_size": 2, "pool": "max"}, inputs, noise=200.0)


def test_nan_is_not_hidden(cuda_device: str) -> None:
    inputs = norm_act_inputs((2, 8, 4, 4), torch.float32, True, cuda_device)
    inputs["conv"][1, 3, 2, 2] = float("nan")
    result = cuda.norm_act_forward(**inputs, latent_size=2, pool="max")
    for tensor in (result.output, result.latents.view(2, 8, 2, 2)):
        assert tensor[:, 3].isnan().all()
        assert not tensor[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()
    assert inputs["running_var"].isnan().sum() == 1


@pytest.mark.gpu
@needs_gpu
def test_more_than_two_to_the_31_elements() -> None:
    shape = (33, 64, 1024, 1024)
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of GPU memory")
    conv = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last).fill_(1.0)
    conv[-1] = -1.0
    ones, zeros = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    result = cuda.norm_act_forward(conv, ones, zeros, zeros.clone(), ones.clone(), latent_size=2)
    mean = 31 / 33
    low, high = (-1 - mean) / (1 - mean**2) ** 0.5 * 0.01, (1 - mean) / (1 - mean**2) ** 0.5
    assert torch.allclose(result.latents[-1].float(), torch.full((256,), low, device="cuda"), rtol=1e-2)
    assert torch.allclose(result.latents[-2].float(), torch.full((256,), high, device="cuda"), rtol=1e-2)
    assert (result.output[-1] < 0).all()
    assert (result.output[-2] > 0).all()
