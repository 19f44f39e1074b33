"""Every backend against the reference in float64 where sizes are one, odd, or no multiple of any vector's length."""

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.kernels import cpp, reference

SIDES = st.integers(1, 5)
WIDTHS = st.integers(1, 5) | st.sampled_from([7, 17, 33])  # channels and latents
SLOPE, EPS = 0.2, 1e-3


def _backend(name: str, device: str) -> ModuleType:
    if name == "cpp" and (problem := cpp.unavailable("cpu")):
        pytest.skip(f"no C++ backend: {problem}")
    if name == "triton":
        pytest.importorskip("triton")
        from unlocked.kernels import triton

        return triton
    return {"cpp": cpp, "torch": reference}[name]


def _divisor(draw: st.DrawFn, *sizes: int) -> int:
    return draw(st.sampled_from([n for n in range(1, 6) if all(size % n == 0 for size in sizes)]))


@st.composite
def norm_cases(draw: st.DrawFn) -> dict[str, Any]:
    """Images of any height and width, or flat activations, with pools and latents that tile them."""
    rows, channels = draw(SIDES), draw(WIDTHS)
    flat = draw(st.booleans())
    height, width = (1, 1) if flat else (draw(SIDES), draw(SIDES))
    pools = ["none"] if flat else ["none", "average"] + ["max"] * (min(height, width) > 1)
    pool = draw(st.sampled_from(pools))
    return {
        "shape": (rows, channels) if flat else (rows, channels, height, width),
        "latent_size": draw(st.sampled_from([0, channels if flat else _divisor(draw, height, width)])),
        "pool": pool,
        "pool_size": _divisor(draw, height, width) if pool == "average" else 2 if pool == "max" else 1,
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
        "offset": draw(st.sampled_from([0.0, 3.0])),
    }


def _norm_inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(case["seed"])
    conv = torch.randn(case["shape"], generator=generator) + case["offset"]
    if case["channels_last"] and conv.dim() == 4:
        conv = conv.contiguous(memory_format=torch.channels_last)
    channels = conv.shape[1]
    vectors = {
        name: torch.rand(channels, generator=generator) + 0.5
        for name in ("weight", "running_mean", "running_var", "conv_bias")
    }
    dims = [0, *range(2, conv.dim())]
    var, mean = torch.var_mean(conv.double(), dims, correction=0, keepdim=True)
    scaled = (conv - mean) * (var + EPS).rsqrt() * vectors["weight"].double().reshape(mean.shape)
    bias = torch.randn(channels, generator=generator)
    for _ in range(50):  # no value so near to LeakyReLU's kink that rounding puts it on the other side
        near = (scaled + bias.double().reshape(mean.shape)).abs().amin(dims) < 1e-4
        bias = torch.where(near, bias + 1e-2, bias)
    return {"conv": conv, "bias": bias, **vectors}


def _wide(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


def _close(got: Tensor, expected: Tensor, what: str) -> None:
    """Within 2e-5 of the largest value: float32 sums of at most some hundred terms. A gradient at a convolution's
    output is a difference of such terms, times the reciprocal of a standard deviation that may be small."""
    assert got.shape == expected.shape, what
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double().cpu(), expected, rtol=0, atol=2e-5 * scale, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("name", ["torch", "cpp", "triton"])
@settings(max_examples=30)
@given(case=norm_cases())
def test_norm_act(name: str, case: dict[str, Any], kernel_device: str) -> None:
    backend = _backend(name, kernel_device)
    device = kernel_device if name == "triton" else "cpu"
    values = _norm_inputs(case)
    truth, mine = _wide(values), {key: value.to(device) for key, value in values.items()}
    sizes = {key: case[key] for key in ("latent_size", "pool", "pool_size")}
    got = backend.norm_act_forward(**mine, **sizes, eps=EPS, negative_slope=SLOPE)
    expected = reference.norm_act_forward(**truth, **sizes, eps=EPS, negative_slope=SLOPE)
    for field, a, b in zip(got._fields, got, expected, strict=True):
        _close(a, b, field)
    for field in ("running_mean", "running_var"):
        _close(mine[field], truth[field], field)

    rstd = float(expected.rstd.max())
    grad = torch.randn_like(expected.latents if case["latent_size"] else truth["conv"])
    kept = [(mine[key], truth[key]) for key in ("conv",)]
    kept += [(got.mean, expected.mean), (got.rstd, expected.rstd)]
    kept += [(mine[key], truth[key]) for key in ("weight", "bias")]
    what, more = "norm_act_backward_full", {}
    if case["latent_size"]:
        kept += [(got.mask_sums, expected.mask_sums), (got.mask_xhat_sums, expected.mask_xhat_sums)]
        what, more = "norm_act_backward", {"latent_size": case["latent_size"]}
    own = grad.to(mine["conv"])
    if not case["latent_size"]:
        own = torch.empty_like(mine["conv"]).copy_(own)
    back = getattr(backend, what)(own, *(a for a, _ in kept), negative_slope=SLOPE, **more)
    true_back = getattr(reference, what)(own.double().cpu(), *(b for _, b in kept), negative_slope=SLOPE, **more)
    _close(back[0] / rstd, true_back[0] / rstd, "conv_grad")
    _close(back[1], true_back[1], "weight_grad")
    _close(back[2], true_back[2], "bias_grad")


@st.composite
def head_cases(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["none", "vector", "matrix", "transposed", "logits"]))
    classes = draw(SIDES | st.just(11))
    return {
        "kind": kind,
        "classes": classes,
        "rows": draw(SIDES),
        "dim": classes if kind == "logits" else draw(WIDTHS),
        "basis_rows": draw(SIDES) if kind in ("matrix", "transposed") else classes,
        "normalize": kind != "logits" and draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "zero": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("name", ["torch", "cpp", "triton"])
@settings(max_examples=30)
@given(case=head_cases())
def test_local_head(name: str, case: dict[str, Any], kernel_device: str) -> None:
    backend = _backend(name, kernel_device)
    device = kernel_device if name == "triton" else "cpu"
    generator = torch.Generator().manual_seed(case["seed"])
    classes, count = case["classes"], case["basis_rows"]
    latents = torch.randn(case["rows"], case["dim"], generator=generator)
    latents[0] *= 0.0 if case["zero"] else 1.0
    labels = torch.randint(classes, (case["rows"],), generator=generator)
    basis = None if case["kind"] == "logits" else torch.randn(count, case["dim"], generator=generator)
    shapes = {"vector": (classes,), "matrix": (count, classes), "transposed": (classes, count)}
    modulation = torch.randn(shapes[case["kind"]], generator=generator) if case["kind"] in shapes else None
    if case["kind"] == "transposed":
        assert modulation is not None
        modulation = modulation.T
    options = {key: case[key] for key in ("normalize", "label_smoothing")}
    options |= {"temperature": 0.7, "basis_gradient": basis is not None}
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    true_totals = torch.zeros(3, dtype=torch.float64)
    given_ = [None if t is None else t.to(device) for t in (latents, labels, basis, modulation)]
    if case["kind"] == "transposed":
        given_[3] = modulation.T.contiguous().to(device).T  # type: ignore[union-attr]
    got = backend.local_head(*given_, **options, totals=totals)
    truth = [None if t is None else t.double() for t in (latents, basis, modulation)]
    expected = reference.local_head(truth[0], labels, *truth[1:], **options, totals=true_totals)
    for field in ("loss_sum", "modulation_grad", "basis_grad"):
        a, b = getattr(got, field), getattr(expected, field)
        assert (a is None) == (b is None), field
        if b is not None:
            _close(a, b, field)
    for i in range(case["rows"]):  # row by row, since the gradient of latents of zero is 1e12 times the others'
        size = max(1.0, float(expected.latents_grad[i].abs().max()))
        _close(got.latents_grad[i] / size, expected.latents_grad[i] / size, "latents_grad")
    _close(totals[:1], true_totals[:1], "totals")
    if classes == 1:
        assert totals.tolist()[1:] == [case["rows"]] * 2
    if classes <= 5:
        assert float(totals[2]) == case["rows"]  # every label is among the first five
