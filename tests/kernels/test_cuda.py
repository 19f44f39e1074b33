"""The CUDA backend's numbers against the reference in float64, bit for bit where that is the contract. On a GPU only.

Tolerances as in test_triton_norm_act.py: a few float32 operations per value (2e-6 of the largest), sums of many terms
(2e-5 of the largest), and half a unit in the last place of the output's type.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unlocked.kernels import cuda, images, reference

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = tuple(ROUNDING)
SLOPE, MOMENTUM, EPS = 0.2, 0.3, 1e-3

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


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]
    vectors = {name: torch.randn(channels, generator=generator) for name in ("bias", "running_mean", "conv_bias")}
    vectors["weight"] = torch.where(torch.randn(channels, generator=generator) > 0, 1.0, -1.0) + vectors["bias"] / 9
    vectors["running_var"] = torch.rand(channels, generator=generator) + 0.5
    conv = (torch.randn(shape, generator=generator) * 2 + 1).to(dtype)
    # The slope jumps at zero: values that close to it are moved away, so that float32 and float64 see the same sign.
    x = conv.double()
    dims = [0, *range(2, x.dim())]
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    scale = vectors["weight"].reshape(per_channel) / (x.var(dims, correction=0, keepdim=True) + EPS).sqrt()
    y = (x - x.mean(dims, keepdim=True)) * scale + vectors["bias"].reshape(per_channel)
    conv = torch.where(y.abs() < 1e-4, conv + 0.0625, conv)
    if channels_last and conv.dim() == 4:
        conv = conv.to(memory_format=torch.channels_last)
    return {name: tensor.to(DEVICE) for name, tensor in {"conv": conv, **vectors}.items()}


def _assert_near(name: str, actual: Tensor, expected: Tensor, rounding: float, share: float) -> None:
    """|actual - expected| <= rounding * |expected| + share * (the largest |expected|), NaN where NaN is.

    Below its normal numbers, float16 has steps of 2**-24.
    """
    assert actual.shape == expected.shape, name
    expected = expected.double()
    largest = expected.nan_to_num(0.0).abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=rounding,
        atol=share * largest + (2**-25 if actual.dtype == torch.float16 else 1e-30),
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def _check_norm_act(shape: tuple[int, ...], case: dict[str, Any], inputs: dict[str, Any], noise: float = 1.0) -> None:
    """All three norm_act functions against the reference in float64; `noise` scales the tolerances."""
    dtype = inputs["conv"].dtype
    exact = {name: tensor.double() for name, tensor in inputs.items()}
    kept = {name: inputs[name].clone() for name in ("running_mean", "running_var")}
    options = {"momentum": MOMENTUM, "eps": EPS, "negative_slope": SLOPE, **case}
    actual = cuda.norm_act_forward(**{**inputs, **kept}, **options)
    expected = reference.norm_act_forward(**exact, **options)
    for name, share in (("mean", 2e-6), ("rstd", 2e-6), ("mask_sums", 2e-6), ("mask_xhat_sums", 2e-5)):
        _assert_near(name, getattr(actual, name), getattr(expected, name), 2e-5 * noise, share * noise)
    for name in ("output", "latents"):
        assert getattr(actual, name).dtype == dtype
        _assert_near(name, getattr(actual, name), getattr(expected, name), ROUNDING[dtype] * noise, 2e-6 * noise)
    for name, vector in kept.items():
        _assert_near(name, vector, exact[name], 1e-5 * noise, 2e-6 * noise)

    common = {name: inputs[name] for name in ("conv", "weight", "bias")} | {"mean": actual.mean, "rstd": actual.rstd}
    generator = torch.Generator().manual_seed(1)
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    grad = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    calls.append(("norm_act_backward_full", {**common, "activations_grad": grad}, {}))
    if case["latent_size"]:
        for kind in {dtype, torch.float32}:
            given = {"mask_sums": actual.mask_sums, "mask_xhat_sums": actual.mask_xhat_sums}
            given["latents_grad"] = torch.randn(actual.latents.shape, generator=generator).to(DEVICE, kind)
            calls.append(("norm_act_backward", common | given, {"latent_size": case["latent_size"]}))
    for name, tensors, options in calls:
        got = getattr(cuda, name)(**tensors, negative_slope=SLOPE, **options)
        wanted = {key: tensor.double() for key, tensor in tensors.items()}
        want = getattr(reference, name)(**wanted, negative_slope=SLOPE, **options)
        assert got[0].stride() == inputs["conv"].stride()
        _assert_near(f"{name} conv_grad", got[0], want[0], ROUNDING[dtype] * noise, 1e-5 * noise)
        _assert_near(f"{name} weight_grad", got[1], want[1], 2e-5 * noise, 2e-5 * noise)
        _assert_near(f"{name} bias_grad", got[2], want[2], 2e-5 * noise, 2e-5 * noise)


class TestNormAct:
    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), SMALL)
    def test_small(
        self,
        shape: tuple[int, ...],
        latent_size: int,
        pool: str,
        pool_size: int,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        case = {"latent_size": latent_size, "pool": pool, "pool_size": pool_size}
        _check_norm_act(shape, case, _inputs(shape, dtype, channels_last))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("shape", "latent_size", "pool", "pool_size"), LAYERS)
    def test_layers(
        self, shape: tuple[int, ...], latent_size: int, pool: str, pool_size: int, dtype: torch.dtype
    ) -> None:
        case = {"latent_size": latent_size, "pool": pool, "pool_size": pool_size}
        _check_norm_act(shape, case, _inputs(shape, dtype, True))

    def test_strided_and_unaligned_memory(self) -> None:
        inputs = _inputs((4, 8, 6, 6), torch.float32, True)
        flat = torch.cat([torch.zeros(1, device=DEVICE), inputs["conv"].permute(0, 2, 3, 1).flatten()])
        unaligned = flat[1:].view(4, 6, 6, 8).permute(0, 3, 1, 2)  # 4 bytes off any 16-byte boundary
        wider = torch.zeros(4, 8, 6, 12, device=DEVICE)
        wider[..., ::2] = inputs["conv"]
        case: dict[str, Any] = {"latent_size": 3, "pool": "max", "momentum": 0.0}
        wanted = cuda.norm_act_forward(**inputs, **case)
        slot = torch.empty(4, 8, 3, 3, device=DEVICE)  # contiguous, where the result is channels-last
        for conv in (unaligned, wider[..., ::2]):
            got = cuda.norm_act_forward(**{**inputs, "conv": conv}, **case, out=slot)
            assert got.output is slot
            assert torch.allclose(got.output, wanted.output, rtol=1e-5, atol=1e-6)
            assert torch.allclose(got.latents, wanted.latents, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("channels_last", [True, False])
    def test_hard_statistics(self, channels_last: bool) -> None:
        """A mean far above the deviation, a constant channel, an outlier: naive sums of squares lose all digits."""
        inputs = _inputs((9, 8, 8, 8), torch.float32, channels_last)
        conv = inputs["conv"]
        conv[:, 1] = conv[:, 1] * 0.01 + 100.0
        conv[:, 2] = 3.0
        conv[0, 3, 0, 0] = 1e4
        inputs["bias"][:4] = 9.0  # no value near the kink
        # A mean of 100 held in float32 is off by up to 4e-6, which is 2e-4 of a deviation of 0.02.
        _check_norm_act((9, 8, 8, 8), {"latent_size": 2, "pool": "max"}, inputs, noise=200.0)

    def test_nan_is_not_hidden(self) -> None:
        inputs = _inputs((2, 8, 4, 4), torch.float32, True)
        inputs["conv"][1, 3, 2, 2] = float("nan")
        result = cuda.norm_act_forward(**inputs, latent_size=2, pool="max")
        for tensor in (result.output, result.latents.view(2, 8, 2, 2)):
            assert tensor[:, 3].isnan().all()
            assert not tensor[:, [0, 1, 2, 4, 5, 6, 7]].isnan().any()
        assert inputs["running_var"].isnan().sum() == 1

    def test_more_than_two_to_the_31_elements(self) -> None:
        shape = (33, 64, 1024, 1024)
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("needs 20 GiB of GPU memory")
        conv = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last).fill_(1.0)
        conv[-1] = -1.0
        ones, zeros = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
        result = cuda.norm_act_forward(conv, ones, zeros, zeros.clone(), ones.clone(), latent_size=2)
        mean = 31 / 33
        low, high = (-1 - mean) / (1 - mean**2) ** 0.5 * 0.01, (1 - mean) / (1 - mean**2) ** 0.5
        assert torch.allclose(result.latents[-1].float(), torch.full((256,), low, device=DEVICE), rtol=1e-2)
        assert torch.allclose(result.latents[-2].float(), torch.full((256,), high, device=DEVICE), rtol=1e-2)
        assert (result.output[-1] < 0).all()
        assert (result.output[-2] > 0).all()


class TestHead:
    # Batch, latents, rows of the basis, classes (None: no modulation, 0: a vector).
    CASES: tuple[tuple[int, int, int, int | None], ...] = (
        (64, 512, 10, None),
        (64, 512, 10, 0),
        (64, 512, 20, 10),
        (1, 7, 3, 5),
        (5, 33, 40, 0),
        (2200, 64, 10, 10),  # four images per block
        (2201, 30, 10, None),
        (3, 8192, 1000, 1000),
        (2, 16, 600, 33),
    )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize(("batch", "dim", "rows", "classes"), CASES)
    def test_rules(
        self, batch: int, dim: int, rows: int, classes: int | None, normalize: bool, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(dim)
        modulation = None
        if classes is not None:
            # Every second column of a wider matrix: strides that are not those of a contiguous one.
            wide = torch.randn(rows, 2 * classes if classes else 2, generator=generator)
            modulation = wide[:, ::2] if classes else wide[:, 0]
        latents = torch.randn(batch, dim, generator=generator).to(dtype)
        labels = torch.randint(0, classes or rows, (batch,), generator=generator)
        options = {
            "normalize": normalize,
            "temperature": 0.5 * dim**0.5,
            "label_smoothing": 0.1,
            "basis_gradient": True,
        }
        _check_head(latents, labels, reference.make_basis(rows, dim), modulation, options)

    def test_logits(self) -> None:
        latents = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        for normalize in (True, False):
            _check_head(latents, torch.arange(64) % 10, None, None, {"normalize": normalize})

    @pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-12, 1e-6, 1e6, 1e25])
    def test_extreme_latents(self, scale: float) -> None:
        latents = torch.randn(6, 24, generator=torch.Generator().manual_seed(0)) * scale
        _check_head(latents, torch.arange(6), reference.make_basis(10, 24), None, {"normalize": True})

    def test_extreme_scores_and_ties(self) -> None:
        scores = torch.tensor([[1e4, -1e4, 0.0], [2.0, 2.0, 2.0], [-1e4, 0.0, 0.0], [0.0, 1.0, float("nan")]])
        _check_head(scores, torch.tensor([1, 0, 1, 2]), None, None, {"normalize": False, "temperature": 0.5})

    def test_wrong_label_is_seen(self) -> None:
        labels = torch.tensor([0, 3], device=DEVICE)
        result = cuda.local_head(torch.randn(2, 3, device=DEVICE), labels, None, normalize=False)
        assert result.loss_sum.isnan()


def _check_head(
    latents: Tensor, labels: Tensor, basis: Tensor | None, modulation: Tensor | None, options: dict[str, Any]
) -> None:
    tensors = (latents, labels, basis, modulation)
    given: list[Any] = [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]
    if modulation is not None:  # .to() may have dropped the strides
        base = torch.zeros((*modulation.shape, 2), device=DEVICE)
        base[..., 0] = given[3]
        given[3] = base[..., 0]
    totals = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE)
    actual = cuda.local_head(*given, **options, totals=totals)
    exact: list[Any] = [None if t is None else t.double() if t.is_floating_point() else t for t in given]
    # The scores and their argmax from latents as wide as the kernel's own arithmetic.
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    expected = reference.local_head(*exact, **options, totals=sums)
    assert actual.latents_grad.dtype == latents.dtype
    assert actual.correct == expected.correct
    _assert_near("loss_sum", actual.loss_sum, expected.loss_sum, 1e-5, 0.0)
    _assert_near("latents_grad", actual.latents_grad, expected.latents_grad, ROUNDING[latents.dtype], 1e-5)
    for name in ("modulation_grad", "basis_grad"):
        if getattr(expected, name) is None:
            assert getattr(actual, name) is None
        else:
            _assert_near(name, getattr(actual, name), getattr(expected, name), 1e-5, 1e-5)
    torch.testing.assert_close(totals[0] - 1.0, actual.loss_sum.double(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert totals[1] - 2.0 == actual.correct
    assert totals[2] - 3.0 == sums[2]


def _dataset(count: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator),
        "labels": torch.randint(0, 10, (count,), generator=generator),
        "order": torch.randperm(count, generator=generator),
        "start": torch.tensor(5),
        "mean": torch.rand(shape[0], generator=generator) * 255,
        "inv_std": torch.rand(shape[0], generator=generator),
        "epoch": torch.tensor(2**32 + 7),
    }


class TestLoadBatch:
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
    def test_bits_of_the_reference(self, shape: tuple[int, int, int], options: dict[str, Any]) -> None:
        data = _dataset(60, shape)
        options = {**options, "seed": -(2**40) - 3}
        boxes = images.make_erase_boxes(*shape[1:]) if "erase_probability" in options else None
        wanted = images.load_batch(**data, size=40, erase_boxes=boxes, **options)
        given = {name: tensor.to(DEVICE) for name, tensor in data.items()}
        boxes = None if boxes is None else boxes.to(DEVICE)
        slot = torch.empty(40, *shape, device=DEVICE).to(memory_format=torch.channels_last)
        for out in (None, (slot, torch.empty(40, dtype=torch.int64, device=DEVICE))):
            got = cuda.load_batch(**given, size=40, erase_boxes=boxes, **options, out=out)
            assert out is None or got[0] is slot
            assert got[0].is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got[0].cpu(), wanted[0])
            assert torch.equal(got[1].cpu(), wanted[1])

    def test_past_the_end_is_seen(self) -> None:
        data = {name: tensor.to(DEVICE) for name, tensor in _dataset(20, (3, 4, 4)).items()}
        data["order"] = torch.cat([data["order"], data["order"]])[:20]  # what lies behind it would be valid
        data["start"].fill_(15)
        pixels, labels = cuda.load_batch(**data, size=8, seed=0)
        assert (labels[5:] == -1).all()
        assert pixels[5:].isnan().all()
        assert not pixels[:5].isnan().any()


def _local_step() -> tuple[dict[str, Tensor], Callable[[], list[Tensor]]]:
    """State, and one pass through every kernel that changes it and returns all results."""
    inputs = _inputs((64, 32, 8, 8), torch.float32, True)
    data = {name: tensor.to(DEVICE) for name, tensor in _dataset(400, (3, 8, 8)).items()}
    boxes = images.make_erase_boxes(8, 8).to(DEVICE)
    basis = reference.make_basis(10, 512).to(DEVICE)
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    totals = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    state = {"totals": totals, **{name: inputs[name] for name in ("running_mean", "running_var")}}
    state |= {"start": data["start"], "epoch": data["epoch"]}

    def step() -> list[Tensor]:
        pixels, labels = cuda.load_batch(
            **data, size=64, seed=1, flip=True, crop_padding=1, erase_probability=0.5, erase_boxes=boxes
        )
        data["start"].add_(64)
        data["epoch"].add_(1)
        forward = cuda.norm_act_forward(**inputs, latent_size=4, pool="max")
        head = cuda.local_head(forward.latents, labels, basis, matrix, basis_gradient=True, totals=totals)
        saved: dict[str, Any] = {
            "mean": forward.mean,
            "rstd": forward.rstd,
            "weight": inputs["weight"],
            "bias": inputs["bias"],
        }
        sums: dict[str, Any] = {"mask_sums": forward.mask_sums, "mask_xhat_sums": forward.mask_xhat_sums}
        backward = cuda.norm_act_backward(head.latents_grad, inputs["conv"], **saved, **sums, latent_size=4)
        full = cuda.norm_act_backward_full(backward[0], inputs["conv"], **saved)
        results = [pixels, labels, *forward, *head, *backward, *full]
        return [tensor for tensor in results if tensor is not None]

    return state, step


def _run_from(state: dict[str, Tensor], start: dict[str, Tensor], run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Three runs from the same state: all results and the final state."""
    for name, tensor in state.items():
        tensor.copy_(start[name])
    results = [tensor.clone() for _ in range(3) for tensor in run()]
    return results + [tensor.clone() for tensor in state.values()]


def test_repeats_bit_for_bit() -> None:
    state, step = _local_step()
    start = {name: tensor.clone() for name, tensor in state.items()}
    first = _run_from(state, start, step)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(_run_from(state, start, step), first, strict=True))


def test_a_captured_graph_gives_the_same_bits() -> None:
    state, step = _local_step()
    start = {name: tensor.clone() for name, tensor in state.items()}
    eager = _run_from(state, start, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    assert all(torch.equal(a, b) for a, b in zip(_run_from(state, start, replay), eager, strict=True))
    assert eager[-5][1] != start["totals"][1]  # the totals did advance
