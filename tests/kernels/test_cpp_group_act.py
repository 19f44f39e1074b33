"""GroupNorm with its activation and latents in C++, against float64 autograd; in bfloat16 against the float32 kernel,
rounded once."""

from typing import Any

import pytest
import torch
from residual_ends import image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, gelu, group_norm, leaky_relu, silu

from unlocked.kernels import cpp
from unlocked.kernels.cpp.group_act import GroupActResult

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")

# Channels in a group: eight, an odd number, one (groups as many as channels), all of them (one group).
SIZES = [
    ((2, 16, 4, 4), 2, 2),
    ((3, 21, 6, 9), 7, 3),
    ((2, 33, 4, 2), 33, 1),
    ((2, 130, 2, 4), 1, 2),
    ((5, 40, 3, 5), 5, 1),
    ((1, 6, 1, 1), 2, 1),
]
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "ReLU": {"negative_slope": 0.0},
    "leaky ReLU": {"negative_slope": 0.2},
    "SiLU": {"activation": "silu"},
    "GELU": {"activation": "gelu"},
}


def _activated(v: Tensor, name: str) -> Tensor:
    if name in ("SiLU", "GELU"):
        return silu(v) if name == "SiLU" else gelu(v)
    return leaky_relu(v, ACTIVATIONS[name].get("negative_slope", 1.0))


def _vectors(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return 1 + 0.5 * torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _back(x: Tensor, grad: Tensor, made: GroupActResult, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return cpp.group_act_backward(grad, x, made.mean, made.rstd, *_vectors(x.shape[1]), **options)


def _assert_near(found: Tensor, expected: Tensor | None) -> None:
    assert expected is not None
    scale = max(float(expected.detach().abs().max()), 0.1)  # some gradients are zero, but for rounding
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups", "p"), SIZES)
def test_values_latents_and_gradients(shape: tuple[int, ...], groups: int, p: int, name: str) -> None:
    x, vectors, options = image(shape, 0) + 3.0, _vectors(shape[1]), ACTIVATIONS[name]
    truth = [one.double().requires_grad_() for one in (x, *vectors)]
    expected = _activated(group_norm(truth[0], groups, *truth[1:], 1e-3), name)
    latents = adaptive_avg_pool2d(expected, p).flatten(1)
    made = cpp.group_act_forward(x, groups, *vectors, eps=1e-3, latent_size=p, **options)
    assert made.output.stride() == x.stride()
    assert made.latents.dtype == torch.float32
    _assert_near(made.output, expected)
    _assert_near(made.latents, latents)
    plain = cpp.group_act_forward(x, groups, *vectors, eps=1e-3, **options)
    assert torch.equal(plain.output, made.output)
    assert plain.latents.numel() == 0
    at_latents, at_all = _numbers(*latents.shape), image(shape, 3)
    of_latents = torch.autograd.grad(latents, truth, at_latents.double(), retain_graph=True)
    of_all = torch.autograd.grad(expected, truth, at_all.double())
    for grad, side, wanted in ((at_latents, p, of_latents), (at_all, 0, of_all)):
        found = _back(x, grad, made, latent_size=side, **options)
        for one, exact in zip(found, wanted, strict=True):
            _assert_near(one, exact)
        place = x.clone()
        again = _back(place, grad, made, latent_size=side, out=place, **options)
        assert again[0] is place
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("name", ["ReLU", "SiLU"])
def test_many_pixels_far_from_zero(name: str) -> None:
    """Thousands of pixels whose mean is a hundred deviations off: sums in float32 alone would not do."""
    x = image((2, 12, 96, 80), 0) + 100.0
    x[:, :, 0] += 20.0  # as beside a border
    truth, vectors = x.double().requires_grad_(), _vectors(12)
    exact = [one.double() for one in vectors]
    expected = _activated(group_norm(truth, 3, *exact), name)
    made = cpp.group_act_forward(x, 3, *vectors, **ACTIVATIONS[name])
    _assert_near(made.output, expected)
    grad = image((2, 12, 96, 80), 1)
    expected.backward(grad.double())
    _assert_near(_back(x, grad, made, **ACTIVATIONS[name])[0], truth.grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bfloat16_is_the_float32_kernel_rounded_once(name: str) -> None:
    x, options = image((2, 20, 4, 6), 0).bfloat16(), ACTIVATIONS[name]
    vectors, at_all = _vectors(20), image((2, 20, 4, 6), 1).bfloat16()
    made = cpp.group_act_forward(x, 4, *vectors, latent_size=2, **options)
    exact = cpp.group_act_forward(x.float(), 4, *vectors, latent_size=2, **options)
    assert torch.equal(made.output, exact.output.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(made[1:], exact[1:], strict=True))
    for grad, side in ((_numbers(2, 80), 2), (at_all, 0)):
        found = _back(x, grad, made, latent_size=side, **options)
        rounded, *of_vectors = _back(x.float(), grad.float(), exact, latent_size=side, **options)
        assert torch.equal(found[0], rounded.bfloat16())
        assert all(torch.equal(a, b) for a, b in zip(found[1:], of_vectors, strict=True))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, vectors, grad, options = image((24, 64, 24, 24), 0), _vectors(64), _numbers(24, 256), ACTIVATIONS["SiLU"]
    found = []
    for threads in (1, 2, 3, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        made = cpp.group_act_forward(x, 4, *vectors, latent_size=2, **options)
        full = _back(x, x, made, **options)
        found.append((*made, *_back(x, grad, made, latent_size=2, **options), *full))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 2)])
def test_what_is_not_finite_spoils_its_group_of_its_image(value: float, place: tuple[int, int], name: str) -> None:
    """Nothing else, and all of that: as with the library."""
    x, vectors, options = image((2, 8, 4, 4), 0), _vectors(8), ACTIVATIONS[name]
    x[(1, 5, *place)] = value
    made = cpp.group_act_forward(x, 2, *vectors, latent_size=2, **options)
    expected = _activated(group_norm(x, 2, *vectors), name)
    assert torch.equal(made.output.isnan(), expected.isnan())
    assert made.output[1, 4:].isnan().all()
    assert made.output[1, :4].isfinite().all()
    assert made.output[0].isfinite().all()
    assert made.latents.view(2, 8, 4)[1, 4:].isnan().all()
    given, *of_vectors = _back(x, image((2, 8, 4, 4), 1), made, **options)
    assert given[1, 4:].isnan().all()
    assert given[1, :4].isfinite().all()
    assert given[0].isfinite().all()
    assert of_vectors[0][4:].isnan().all()
    assert of_vectors[0][:4].isfinite().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_group_of_equal_numbers(name: str) -> None:
    """Its variance is zero: what comes out is the bias alone."""
    x, vectors, options = image((2, 12, 4, 4), 0), _vectors(12), ACTIVATIONS[name]
    x[1, 3:6] = 1234.567
    made = cpp.group_act_forward(x, 4, *vectors, **options)
    bias = _activated(vectors[1].double(), name)[3:6, None, None].expand(3, 4, 4)
    _assert_near(made.output[1, 3:6], bias)
    truth = x.double().requires_grad_()
    grad = image((2, 12, 4, 4), 1)
    _activated(group_norm(truth, 4, *(one.double() for one in vectors)), name).backward(grad.double())
    assert truth.grad is not None
    given = _back(x, grad, made, **options)[0]
    for part in (slice(3), slice(3, 6), slice(6, 12)):
        _assert_near(given[1, part], truth.grad[1, part])


def test_extremes_of_the_activations() -> None:
    """A normalised value of thousands, either sign: no overflow on the way."""
    x, weight, bias = image((1, 16, 4, 4), 0), torch.full((16,), 1e4), torch.zeros(16)
    for name, options in ACTIVATIONS.items():
        truth = x.double().requires_grad_()
        expected = _activated(group_norm(truth, 4, weight.double(), bias.double()), name)
        expected.sum().backward()
        made = cpp.group_act_forward(x, 4, weight, bias, **options)
        _assert_near(made.output, expected)
        given = cpp.group_act_backward(torch.ones_like(x), x, made.mean, made.rstd, weight, bias, **options)[0]
        assert truth.grad is not None
        torch.testing.assert_close(given.double(), truth.grad, rtol=1e-4, atol=1e-5 * 1e4)
