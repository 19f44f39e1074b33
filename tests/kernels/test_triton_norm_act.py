"""The Triton kernels of BatchNorm + LeakyReLU + pooling against the reference in float64.

Tolerances: the kernels compute in float32 what the reference computes in float64. A value is a few operations away
from its input (relative error about 1e-6), a sum adds a few units in the last place of its largest terms; outputs in
bfloat16 and float16 are rounded once more, by at most half a unit in the last place (2**-8 and 2**-11; Triton's
interpreter truncates, and so loses up to a whole unit).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.kernels import reference

pytest.importorskip("triton")
from unlocked.kernels import triton as fused
from unlocked.kernels.triton import norm_act_geometry

UNITS = 0.51 if torch.cuda.is_available() else 1.01  # in the last place
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: UNITS * 2**-7, torch.float16: UNITS * 2**-10}
SUMS = 2e-5  # of float32 sums, relative to the largest
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3
# Shape, latent_size, pool, pool_size. Up to 1024 rows are one launch, above it two; more where windows don't nest.
CASES: list[tuple[tuple[int, ...], int, reference.PoolKind, int]] = [
    ((3, 5, 8, 8), 2, "max", 1),
    ((20, 5, 8, 8), 2, "max", 1),
    ((18, 5, 8, 8), 2, "average", 2),
    ((30, 5, 6, 6), 2, "max", 1),  # windows of 3 x 3: two launches
    ((30, 5, 6, 6), 1, "average", 3),
    ((18, 3, 7, 9), 1, "none", 1),
    ((18, 3, 7, 9), 0, "max", 1),
    ((18, 3, 8, 8), 0, "none", 1),
    ((18, 3, 8, 8), 0, "average", 4),
    ((1, 2, 4, 4), 4, "max", 1),  # windows of one pixel
    ((1, 1, 40, 48), 1, "max", 1),  # a window larger than a tile
    ((7, 33), 33, "none", 1),
    ((1030, 9), 9, "none", 1),
    ((1, 3), 0, "none", 1),
]
# Both memory formats where there are two, and where it does not take long.
FORMATS = [(*case, last) for case in CASES for last in (True, False) if last or (len(case[0]) == 4 and case[0][1] < 9)]


def _inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype, channels_last: bool) -> dict[str, Tensor]:
    torch.manual_seed(sum(shape))
    channels = shape[1]
    conv = (torch.randn(shape) * 2 + 1).to(dtype)
    if channels_last and len(shape) == 4:
        conv = conv.to(memory_format=torch.channels_last)
    vectors = {name: torch.randn(channels) for name in ("weight", "bias", "running_mean", "conv_bias")}
    vectors["running_var"] = torch.rand(channels) + 0.5
    vectors["bias"] = _away_from_the_kink(conv.double(), vectors["weight"].double(), vectors["bias"])
    return {name: tensor.to(device) for name, tensor in {"conv": conv, **vectors}.items()}


def _away_from_the_kink(conv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Moves the bias until no value is so near to LeakyReLU's kink that rounding could put it on the other side."""
    dims = [0, *range(2, conv.dim())]
    var, mean = torch.var_mean(conv, dims, correction=0, keepdim=True)
    scaled = (conv - mean) * (var + EPS).rsqrt() * weight.reshape(mean.shape)
    for _ in range(20):
        near = (scaled + bias.double().reshape(mean.shape)).abs().amin(dims) < 1e-5
        bias = torch.where(near, bias + 1e-3, bias)
    return bias


def _copy(inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().to(dtype or tensor.dtype) for name, tensor in inputs.items()}


def _options(**more: Any) -> dict[str, Any]:
    return {"momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE, **more}


def _close(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    """Within `relative` of the largest expected value: what a sum or a rounding may lose."""
    assert actual.shape == expected.shape, what
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0.0, atol=relative * scale, msg=lambda text: f"{what}: {text}"
    )


def _check_forward(inputs: dict[str, Tensor], **options: Any) -> reference.NormActResult:
    """Compares every output; returns the truth in float64."""
    mine, wide = _copy(inputs), _copy(inputs, torch.float64)
    truth = reference.norm_act_forward(**wide, **_options(**options))
    result = fused.norm_act_forward(**mine, **_options(**options))
    dtype = inputs["conv"].dtype
    assert result.output.dtype == result.latents.dtype == dtype
    _close(result.output, truth.output, ROUNDING[dtype], "output")
    _close(result.latents, truth.latents, ROUNDING[dtype], "latents")
    for name in ("mean", "rstd", "mask_sums", "mask_xhat_sums"):
        assert getattr(result, name).dtype == torch.float32
        _close(getattr(result, name), getattr(truth, name), SUMS, name)
    for name in ("running_mean", "running_var"):
        _close(mine[name], wide[name], 2e-6, name)
    return truth


def _check_backward(inputs: dict[str, Tensor], truth: reference.NormActResult, latent_size: int, full: bool) -> None:
    conv, weight, bias = (inputs[name] for name in ("conv", "weight", "bias"))
    narrow = [tensor.float() for tensor in truth[2:]]
    grad = torch.randn(conv.shape if full else truth.latents.shape).to(conv)
    wide = [tensor.double() for tensor in (grad, conv, truth.mean, truth.rstd, weight, bias)]
    if full:
        expected = reference.norm_act_backward_full(*wide, negative_slope=SLOPE)
        actual = fused.norm_act_backward_full(grad, conv, *narrow[:2], weight, bias, negative_slope=SLOPE)
    else:
        more: dict[str, Any] = {"latent_size": latent_size, "negative_slope": SLOPE}
        expected = reference.norm_act_backward(*wide, truth.mask_sums, truth.mask_xhat_sums, **more)
        actual = fused.norm_act_backward(grad, conv, *narrow[:2], weight, bias, *narrow[2:], **more)
    assert actual[0].dtype == conv.dtype
    if conv.is_contiguous() or conv.is_contiguous(memory_format=torch.channels_last):
        assert actual[0].stride() == conv.stride()
    _close(actual[0], expected[0], ROUNDING[conv.dtype] * 2, "conv_grad")
    _close(actual[1], expected[1], SUMS, "weight_grad")
    _close(actual[2], expected[2], SUMS, "bias_grad")


@pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size", "channels_last"), FORMATS)
def test_matches_reference(
    kernel_device: str,
    shape: tuple[int, ...],
    latent_size: int,
    pool: reference.PoolKind,
    pool_size: int,
    channels_last: bool,
) -> None:
    inputs = _inputs(shape, kernel_device, torch.float32, channels_last)
    truth = _check_forward(inputs, latent_size=latent_size, pool=pool, pool_size=pool_size)
    _check_backward(inputs, truth, latent_size, full=True)
    if latent_size:
        _check_backward(inputs, truth, latent_size, full=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "latent_size", "channels_last"), [((20, 5, 8, 8), 2, True), ((20, 5, 8, 8), 2, False), ((9, 6), 6, True)]
)
def test_half_precision(
    kernel_device: str, dtype: torch.dtype, shape: tuple[int, ...], latent_size: int, channels_last: bool
) -> None:
    inputs = _inputs(shape, kernel_device, dtype, channels_last)
    truth = _check_forward(inputs, latent_size=latent_size, pool="max" if len(shape) == 4 else "none")
    _check_backward(inputs, truth, latent_size, full=False)
    _check_backward(inputs, truth, latent_size, full=True)


@pytest.mark.parametrize(("shape", "latent_size"), [((20, 5, 8, 8), 4), ((5, 3, 8, 8), 1), ((33, 7), 7)])
def test_non_contiguous_inputs_and_slots(kernel_device: str, shape: tuple[int, ...], latent_size: int) -> None:
    inputs = _inputs(shape, kernel_device, torch.float32, channels_last=False)
    inputs["conv"] = inputs["conv"].repeat_interleave(2, dim=-1)[..., ::2]  # every second element
    assert not inputs["conv"].is_contiguous()
    truth = _check_forward(inputs, latent_size=latent_size)
    _check_backward(inputs, truth, latent_size, full=False)
    _check_backward(inputs, truth, latent_size, full=True)
    pool: reference.PoolKind = "max" if len(shape) == 4 else "none"
    side = [4, 4] if len(shape) == 4 else []
    memory = torch.full((shape[0], shape[1] + 2, *side), 7.0, device=kernel_device)
    slot = memory[:, 1:-1]
    plain = fused.norm_act_forward(**_copy(inputs), latent_size=latent_size, pool=pool)
    into = fused.norm_act_forward(**_copy(inputs), latent_size=latent_size, pool=pool, out=slot)
    assert into.output.data_ptr() == slot.data_ptr()
    assert torch.equal(slot, plain.output)
    assert (memory[:, 0] == 7).all()
    assert (memory[:, -1] == 7).all()


@pytest.mark.parametrize("shape", [(100, 6), (20, 6, 8, 8), (1100, 6)])
def test_statistics_of_a_large_mean(kernel_device: str, shape: tuple[int, ...]) -> None:
    """A mean of 1e3 and a deviation of 1: sums of squares in float32 would leave no digit of the variance."""
    conv = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 1e3).to(kernel_device)
    conv[0] += 1e2  # outliers in front, where a shift by the first value would look
    inputs = _inputs(shape, kernel_device, torch.float32, channels_last=True) | {"conv": conv}
    mine = _copy(inputs)
    result = fused.norm_act_forward(**mine, **_options(latent_size=0))
    dims = [0, *range(2, conv.dim())]
    var, mean = torch.var_mean(conv.double(), dims, correction=0)
    # The mean is a plain float32 sum of up to 1024 means, off by a few units in the last place. The deviations are
    # taken from it only after it is known, so its error enters the variance squared.
    torch.testing.assert_close(result.mean.double(), mean, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(result.rstd.double(), (var + EPS).rsqrt(), rtol=1e-5, atol=0.0)


def test_many_partial_results_are_merged(kernel_device: str) -> None:
    """More partial results than one block of the merge, the last block not full; two blocks of channels."""
    with _launch_geometry(WHOLE_ROWS=0, LARGE=1, BLOCK_P=8):
        inputs = _inputs((9, 34, 4, 4), kernel_device, torch.float32, channels_last=True)
        geometry = norm_act_geometry.forward_geometry(norm_act_geometry.Shape(9, 34, 4, 4, True, 4), 2, "max", 1)
        assert geometry.reduction is not None
        assert geometry.reduction.grid == (9, 2)
        truth = _check_forward(inputs, latent_size=2, pool="max")
        _check_backward(inputs, truth, 2, full=True)
        _check_backward(inputs, truth, 2, full=False)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("pool", ["none", "max", "average"])
def test_several_tiles_per_program(kernel_device: str, pool: reference.PoolKind, channels_last: bool) -> None:
    """As of 1056 programs on: each walks over several tiles, the last of them not full."""
    with _launch_geometry(WHOLE_ROWS=0, TILE=128, PROGRAMS=3):
        shape = norm_act_geometry.Shape(11, 5, 8, 8, channels_last, 4)
        for geometry in (
            norm_act_geometry.forward_geometry(shape, 2, pool, 2),
            norm_act_geometry.backward_geometry(shape, 2),
            norm_act_geometry.backward_geometry(shape, 0),
        ):
            last = geometry.passes[-1]
            assert last.num_tiles > 2 * last.grid[0]
        inputs = _inputs((11, 5, 8, 8), kernel_device, torch.float32, channels_last)
        truth = _check_forward(inputs, latent_size=2, pool=pool, pool_size=2)
        _check_backward(inputs, truth, 2, full=True)
        _check_backward(inputs, truth, 2, full=False)


@contextmanager
def _launch_geometry(**changed: int) -> Iterator[None]:
    """Other thresholds, so that small tensors take the ways of large ones."""
    geometries = (norm_act_geometry.forward_geometry, norm_act_geometry.backward_geometry)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(norm_act_geometry, name, value)
        for geometry in geometries:
            geometry.cache_clear()
        yield
    for geometry in geometries:
        geometry.cache_clear()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_small_shape(kernel_device: str, data: st.DataObject) -> None:
    batch, channels, side_h, side_w = (data.draw(st.integers(1, most)) for most in (4, 9, 4, 4))
    latent_size = data.draw(st.integers(0, 3))
    height, width = side_h * max(latent_size, 1), side_w * max(latent_size, 1)
    pools: list[reference.PoolKind] = ["none", "average", *(["max"] if min(height, width) > 1 else [])]
    pool = data.draw(st.sampled_from(pools))
    divisors = [size for size in range(1, min(height, width) + 1) if height % size == width % size == 0]
    pool_size = data.draw(st.sampled_from(divisors))
    inputs = _inputs((batch, channels, height, width), kernel_device, torch.float32, data.draw(st.booleans()))
    if not data.draw(st.booleans()):
        del inputs["conv_bias"]
    whole_rows, tile = data.draw(st.sampled_from([0, 1024])), data.draw(st.sampled_from([128, 2048]))
    with _launch_geometry(WHOLE_ROWS=whole_rows, TILE=tile):
        truth = _check_forward(inputs, latent_size=latent_size, pool=pool, pool_size=pool_size)
        _check_backward(inputs, truth, latent_size, full=latent_size == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv": torch.randn(2, 3, 4, 4, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"conv": torch.randn(2, 3, 4)}, r"\[B, C, H, W\]"),
        ({"conv": torch.randn(0, 3, 4, 4)}, "not empty"),
        ({"weight": torch.randn(4)}, "weight must be"),
        ({"conv_bias": torch.randn(6)[::2]}, "conv_bias must be a contiguous vector"),
        ({"latent_size": 3}, "does not tile"),
        ({"pool": "average", "pool_size": 3}, "does not tile"),
        ({"pool": "min"}, "pool must be"),
        ({"out": torch.empty(2, 3, 4, 5)}, "out must be"),
        ({"conv": torch.randn(2, 3), "latent_size": 2}, "a linear block's fused latents"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    vector = torch.zeros(3)
    arguments = dict.fromkeys(("weight", "bias", "running_mean", "running_var", "conv_bias"), vector)
    call: dict[str, Any] = {"conv": torch.randn(2, 3, 4, 4), "latent_size": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        fused.norm_act_forward(**call | change)


def test_wrong_gradients_are_refused() -> None:
    conv, vector, sums = torch.randn(2, 3, 4, 4), torch.ones(3), torch.ones(2, 12)
    state = (conv, vector, vector, vector, vector)
    with pytest.raises(ValueError, match="mask_sums must be"):
        fused.norm_act_backward(sums, *state, sums[:1], sums, latent_size=2)
    with pytest.raises(ValueError, match="norm_act_backward_full"):
        fused.norm_act_backward(sums, *state, sums, sums, latent_size=0)
    with pytest.raises(ValueError, match="activations_grad must be"):
        fused.norm_act_backward_full(conv[:1], *state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    """What only a GPU can show: capture, repeatability, 64-bit offsets."""

    SHAPES: ClassVar = [((64, 32, 32, 32), 4, "max"), ((64, 128, 8, 8), 2, "average"), ((64, 512), 512, "none")]

    @staticmethod
    def _step(inputs: dict[str, Tensor], grad: Tensor, latent_size: int, pool: Any) -> list[Tensor]:
        result = fused.norm_act_forward(**inputs, latent_size=latent_size, pool=pool, pool_size=2)
        conv, weight, bias = (inputs[name] for name in ("conv", "weight", "bias"))
        state = (conv, result.mean, result.rstd, weight, bias)
        grads = fused.norm_act_backward(grad, *state, result.mask_sums, result.mask_xhat_sums, latent_size=latent_size)
        return [*result, *grads, *fused.norm_act_backward_full(conv, *state)]

    @pytest.mark.parametrize(("shape", "latent_size", "pool"), SHAPES)
    def test_repeats_bit_by_bit(self, shape: tuple[int, ...], latent_size: int, pool: str) -> None:
        inputs = _inputs(shape, "cuda", torch.float32, channels_last=True)
        grad = torch.randn(shape[0], shape[1] * (latent_size**2 if len(shape) == 4 else 1), device="cuda")
        first = self._step(_copy(inputs), grad, latent_size, pool)
        for _ in range(50):
            again = self._step(_copy(inputs), grad, latent_size, pool)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    @pytest.mark.parametrize(("shape", "latent_size", "pool"), SHAPES)
    def test_replayed_graph_equals_eager(self, shape: tuple[int, ...], latent_size: int, pool: str) -> None:
        inputs = _inputs(shape, "cuda", torch.float32, channels_last=True)
        grad = torch.randn(shape[0], shape[1] * (latent_size**2 if len(shape) == 4 else 1), device="cuda")
        eager = _copy(inputs)
        expected = [self._step(eager, grad, latent_size, pool) for _ in range(3)][-1]
        static = _copy(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # the kernels are compiled already
            captured = self._step(static, grad, latent_size, pool)
        for _ in range(3):
            graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(expected, captured, strict=True))
        assert torch.equal(eager["running_mean"], static["running_mean"])
        assert torch.equal(eager["running_var"], static["running_var"])

    def test_layers_on_several_streams_do_not_disturb_each_other(self) -> None:
        inputs = _inputs((64, 32, 32, 32), "cuda", torch.float32, channels_last=True)
        grad = torch.randn(64, 512, device="cuda")
        expected = self._step(_copy(inputs), grad, 4, "max")
        copies = [_copy(inputs) for _ in range(4)]
        torch.cuda.synchronize()
        results = []
        for copy in copies:
            with torch.cuda.stream(torch.cuda.Stream()):
                results.append([self._step(copy, grad, 4, "max") for _ in range(5)][-1])
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(one, other) for one, other in zip(expected, result, strict=True))

    def test_more_than_2_to_31_elements(self) -> None:
        """The last images lie beyond 32-bit offsets; they are compared with the same images alone."""
        shape = (2**17 + 8, 64, 16, 16)
        elements = shape[0] * shape[1] * 16 * 16
        assert elements > 2**31
        if torch.cuda.mem_get_info()[0] < 3.5 * 2 * elements:
            pytest.skip("needs 16 GiB of free memory")
        one = torch.randn(8, *shape[1:], device="cuda").bfloat16()
        conv = one.repeat(shape[0] // 8, 1, 1, 1).to(memory_format=torch.channels_last)
        one = one.to(memory_format=torch.channels_last)
        grad = torch.randn(8, 256, device="cuda").bfloat16()
        vectors = {name: torch.rand(64, device="cuda") for name in ("weight", "bias", "running_mean", "running_var")}
        small = fused.norm_act_forward(one, **_copy(vectors), latent_size=2, pool="max")
        large = fused.norm_act_forward(conv, **_copy(vectors), latent_size=2, pool="max")
        # The same statistics, but for their rounding: bfloat16 results differ by a unit at most, seldom.
        torch.testing.assert_close(large.mean, small.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(large.rstd, small.rstd, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(large.output[-8:], small.output, rtol=2**-6, atol=1e-3)
        torch.testing.assert_close(large.latents[-8:], small.latents, rtol=2**-6, atol=1e-3)
        state = (large.mean, large.rstd, vectors["weight"], vectors["bias"])
        del small
        sums = (large.mask_sums, large.mask_xhat_sums)
        grads = grad.repeat(shape[0] // 8, 1)
        expected, _, _ = fused.norm_act_backward(grad, one, *state, sums[0][-8:], sums[1][-8:], latent_size=2)
        actual, _, _ = fused.norm_act_backward(grads, conv, *state, *sums, latent_size=2)
        torch.testing.assert_close(actual[-8:], expected, rtol=2**-6, atol=1e-3)
