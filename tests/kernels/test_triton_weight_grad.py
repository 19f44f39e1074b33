"""The weight gradient with BatchNorm's way back inside, against float64 autograd of the layer as it is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joined_cases import CASES, OFF, PADDED, SLOPE, Case, Layer, check, layer_of

pytest.importorskip("triton")
from unlocked.data import ImageDataset
from unlocked.kernels import triton as fused
from unlocked.kernels.triton import joined, weight_grad, weight_grad_geometry
from unlocked.kernels.triton.norm_act import shape_of
from unlocked.models import ConvBlock, OutputBlock
from unlocked.rules import LLS
from unlocked.runtime import Sequential, Streams, Trainer


def _gradients(case: Case, layer: Layer) -> weight_grad.WeightGradResult:
    return fused.norm_act_weight_grad(
        *layer.arguments, latent_size=case.latent_size, negative_slope=SLOPE, **case.options
    )


def _check(case: Case, layer: Layer, off: float) -> None:
    check(_gradients(case, layer), layer, off)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_is_the_gradient_that_autograd_finds(kernel_device: str, name: str, channels_last: bool) -> None:
    with _in_full_precision():
        _check(CASES[name], layer_of(CASES[name], kernel_device, channels_last=channels_last), OFF[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["three colours", "tiles of columns"])
def test_half_precision(kernel_device: str, name: str, dtype: torch.dtype) -> None:
    _check(CASES[name], layer_of(CASES[name], kernel_device, dtype), OFF[dtype])


@pytest.mark.parametrize(
    ("name", "batch"), [("windows of nine", 5), ("window of several steps", 4), ("tiles of channels", 10)]
)
def test_several_steps_in_each_split(kernel_device: str, name: str, batch: int) -> None:
    """As of large batches: a few splits of several steps, the last of them not full; sums of several blocks."""
    case = CASES[name]._replace(source=(batch, *CASES[name].source[1:]))
    with _geometry(PROGRAMS=7, STEP_BYTES=16 * 4, SUM_TILE=32), _in_full_precision():
        layer = layer_of(case, kernel_device)
        geometry = weight_grad_geometry.weight_grad_geometry(
            shape_of(layer.arguments[1]), case.latent_size, _convolution(case), tf32=False
        )
        assert 1 < geometry.splits < geometry.num_steps
        assert geometry.splits * geometry.steps_per_split > geometry.num_steps
        assert geometry.splits > geometry.sum_constants["BLOCK_S"]
        _check(case, layer, OFF[torch.float32])


def _convolution(case: Case) -> weight_grad_geometry.Convolution:
    default = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return weight_grad_geometry.Convolution(source=case.source[1:], kernel=case.kernel, **default | case.options)


@contextmanager
def _geometry(**changed: int) -> Iterator[None]:
    """Other thresholds, so that small tensors take the ways of large ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setattr(weight_grad_geometry, name, value)
        weight_grad_geometry.weight_grad_geometry.cache_clear()
        yield
    weight_grad_geometry.weight_grad_geometry.cache_clear()


@contextmanager
def _in_full_precision() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield


@given(data=st.data())
@settings(max_examples=12)
def test_any_small_convolution(kernel_device: str, data: st.DataObject) -> None:
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    latent_size, windows = data.draw(st.integers(1, 3)), pair(1, 3)
    kernel, stride, dilation = pair(1, 3), pair(1, 2), pair(1, 2)
    padding = tuple(data.draw(st.integers(0, k - 1)) for k in kernel)
    sides = [
        (latent_size * w - 1) * s + d * (k - 1) + 1 - 2 * p
        for w, k, s, d, p in zip(windows, kernel, stride, dilation, padding, strict=True)
    ]
    # A plane of one pixel and batch has no variance.
    batch, inputs, channels = (data.draw(st.integers(1, most)) for most in (4, 6, 9))
    if min(sides) < 1 or batch * latent_size**2 * windows[0] * windows[1] < 2:
        return
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    case = Case((batch, inputs, sides[0], sides[1]), channels, kernel, latent_size, options)
    with _geometry(PROGRAMS=data.draw(st.sampled_from([2, 132]))), _in_full_precision():
        _check(case, layer_of(case, kernel_device, channels_last=data.draw(st.booleans())), OFF[torch.float32])


def test_every_run_gives_the_same_bits(kernel_device: str) -> None:
    case = CASES["tiles of columns"]
    layer = layer_of(case, kernel_device)
    first = _gradients(case, layer)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(_gradients(case, layer), first, strict=True))


def test_strides_of_all_kinds(kernel_device: str) -> None:
    case = CASES["whole vectors"]
    grad, conv, *rest, source, kernel = layer_of(case, kernel_device).arguments
    wanted = fused.norm_act_weight_grad(grad, conv, *rest, source, kernel, latent_size=4, **PADDED)
    spread = [t.repeat_interleave(2, dim=-1)[..., ::2] for t in (conv, source)]
    assert not spread[0].is_contiguous(memory_format=torch.channels_last)
    found = fused.norm_act_weight_grad(grad, spread[0], *rest, spread[1], kernel, latent_size=4, **PADDED)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.zeros(3, 1, 3, 3)}, "no convolution of one group .* its output would be"),
        ({"padding": (0, 0)}, r"its output would be \(2, 3, 2, 2\)"),
        ({"source": torch.zeros(2, 2, 4)}, "four dimensions"),
        ({"source": torch.zeros(2, 2, 4, 4).bfloat16()}, "of one type and device"),
        ({"conv": torch.zeros(2, 3, 4, 4).double()}, "float32, bfloat16 or float16"),
        ({"latent_size": 3}, "does not tile"),
        ({"latent_size": 0}, "norm_act_backward_full"),
        ({"mask_sums": torch.zeros(2, 3)}, "mask_sums must be"),
        ({"mean": torch.zeros(4)}, "mean must be"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    sums = dict.fromkeys(("latents_grad", "mask_sums", "mask_xhat_sums"), torch.zeros(2, 12))
    vectors = dict.fromkeys(("mean", "rstd", "weight", "bias"), torch.ones(3))
    tensors = {"conv": torch.zeros(2, 3, 4, 4), "source": torch.zeros(2, 2, 4, 4), "kernel": torch.zeros(3, 2, 3, 3)}
    with pytest.raises(ValueError, match=message):
        fused.norm_act_weight_grad(**{**sums, **vectors, **tensors, "latent_size": 2, **PADDED} | change)


def _network() -> list[Any]:
    torch.manual_seed(0)
    return [
        ConvBlock(1, 8, name="first", pool="max", latent_size=2),
        ConvBlock(8, 4, name="second", latent_size=1),  # 72 elements of a kernel: more than Triton's own backend joins
        OutputBlock(16, 2),
    ]


def test_training_takes_it_and_every_engine_gives_its_bits(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> None:
    """And weights that the library's weight gradient gives too, but for rounding."""
    calls: list[tuple[int, ...]] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(tuple(arguments[9].shape))
        return weight_grad.norm_act_weight_grad(*arguments, **options)

    monkeypatch.setattr(fused, "norm_act_weight_grad", counted)
    images = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    data = ImageDataset(name="tiny", split="train", images=images, labels=torch.arange(6) % 2, num_classes=2)
    digests, weights = [], []
    for kernels, engine in (("triton", Sequential()), ("triton_joined", Sequential()), ("triton_joined", Streams())):
        options = {"engine": engine, "kernels": kernels, "device": kernel_device, "precision": "fp32"}
        trainer = Trainer(_network(), rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), **options)
        digests.append(trainer.fit(data, epochs=1, batch_size=3).weights_sha256)
        weights.append([p.detach().clone() for p in trainer.module.parameters()])
        assert set(calls) == {(8, 1, 3, 3)} | ({(4, 8, 3, 3)} if kernels == "triton_joined" else set())
        calls.clear()
    assert digests[1] == digests[2]
    for a, b in zip(weights[0], weights[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_joined_backend_is_tritons_but_for_one_ability() -> None:
    assert joined.ABILITIES.weight_gradient > fused.ABILITIES.weight_gradient > 0
    for name in set(joined.__all__) - {"ABILITIES"}:
        assert getattr(joined, name) is getattr(fused, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = joined.nothing


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize(("inputs", "channels", "side", "p"), [(3, 32, 32, 4), (32, 64, 16, 2), (64, 128, 8, 2)])
def test_small_conv_on_a_device(inputs: int, channels: int, side: int, p: int, precision: str) -> None:
    """tf32 rounds the factors of each product to 11 bits; the errors of 4,096 and more products even out."""
    case = Case((64, inputs, side, side), channels, (3, 3), p, PADDED)
    layer = layer_of(case, "cuda", torch.bfloat16 if precision == "bf16" else torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
        _check(case, layer, {"ieee": 1e-4, "tf32": 3e-3, "bf16": 2e-2}[precision])
        first = _gradients(case, layer)
        assert all(torch.equal(a, b) for a, b in zip(_gradients(case, layer), first, strict=True))
