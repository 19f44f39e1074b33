"""The C++ norm_act against the reference in float64, on every shape that it takes and some that it hands on."""

from functools import partial
from types import ModuleType

import pytest
import torch

from unlocked.kernels import cpp, reference

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason=f"no C++ backend: {cpp.unavailable('cpu')}")

# float32 rounding of sums over at most a few thousand terms of order one
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def norm_inputs(batch: int, channels: int, side: int, *, flat: bool = False, offset: float = 0.0) -> dict:
    generator = torch.Generator().manual_seed(batch * 1009 + channels * 31 + side)
    shape = (batch, channels) if flat else (batch, channels, side, side)
    conv = torch.randn(shape, generator=generator) + offset
    if not flat:
        conv = conv.contiguous(memory_format=torch.channels_last)
    vectors = {
        name: torch.rand(channels, generator=generator) + 0.5
        for name in ("weight", "running_mean", "running_var", "conv_bias")
    }
    return {"conv": conv, "bias": torch.randn(channels, generator=generator), **vectors}


def double(values: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


def check_norm_act(values: dict, latent_size: int, pool: str, pool_size: int) -> None:
    options = {"latent_size": latent_size, "pool": pool, "pool_size": pool_size}
    ours, truth = {k: v.clone() for k, v in values.items()}, double(values)
    got = cpp.norm_act_forward(**ours, **options)
    expected = reference.norm_act_forward(**truth, **options)
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name].double(), truth[name], **TOLERANCE)
    if not latent_size:
        return
    grad = torch.randn_like(got.latents)
    common = (ours["weight"], ours["bias"])
    back = cpp.norm_act_backward(
        grad, ours["conv"], got.mean, got.rstd, *common, got.mask_sums, got.mask_xhat_sums, latent_size=latent_size
    )
    true_back = reference.norm_act_backward(
        grad.double(),
        truth["conv"],
        expected.mean,
        expected.rstd,
        truth["weight"],
        truth["bias"],
        expected.mask_sums,
        expected.mask_xhat_sums,
        latent_size=latent_size,
    )
    for a, b in zip(back, true_back, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)  # sums of up to 4,000 products


@pytest.mark.parametrize(
    ("batch", "channels", "side", "latent_size", "pool", "pool_size"),
    [
        (4, 32, 8, 4, "max", 2),
        (3, 7, 4, 2, "average", 2),
        (1, 5, 6, 3, "none", 1),
        (5, 16, 6, 0, "average", 3),
        (2, 3, 7, 7, "max", 2),
        (2, 9, 5, 2, "none", 1),  # latents that overlap: not in closed form, so the reference refuses
        (6, 33, 2, 1, "average", 1),
    ],
)
def test_norm_act_matches_the_reference(
    batch: int, channels: int, side: int, latent_size: int, pool: str, pool_size: int
) -> None:
    values = norm_inputs(batch, channels, side)
    if latent_size and side % latent_size:
        with pytest.raises(ValueError, match="does not tile"):
            cpp.norm_act_forward(**values, latent_size=latent_size, pool=pool, pool_size=pool_size)
        return
    check_norm_act(values, latent_size, pool, pool_size)


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_linear_blocks(batch: int) -> None:
    check_norm_act(norm_inputs(batch, 40, 1, flat=True), 40, "none", 1)


def test_a_large_mean_does_not_spoil_the_variance() -> None:
    values = norm_inputs(4, 8, 8, offset=1000.0)
    got = cpp.norm_act_forward(**values, latent_size=4)
    var = values["conv"].double().var((0, 2, 3), correction=0)
    # float32 inputs near 1000 carry an error of 6e-5 each, against a standard deviation of one
    torch.testing.assert_close(got.rstd.double(), (var + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "conv_bias"])
def test_a_vector_may_lie_across_others(name: str) -> None:
    values = norm_inputs(4, 8, 8)
    expected, others = {k: v.clone() for k, v in values.items()}, torch.full((8, 3), 1e3)
    others[:, 1] = values[name]
    values[name] = others[:, 1]
    results = []
    for given in (values, expected):
        got = cpp.norm_act_forward(**given, latent_size=4)
        state = (given["conv"], got.mean, got.rstd, given["weight"], given["bias"])
        back = cpp.norm_act_backward(
            torch.ones_like(got.latents), *state, got.mask_sums, got.mask_xhat_sums, latent_size=4
        )
        full = cpp.norm_act_backward_full(torch.ones_like(given["conv"]), *state)
        results.append([*got, *back, *full, given["running_mean"], given["running_var"]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert bool((others[:, [0, 2]] == 1e3).all())


def test_results_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            values = norm_inputs(5, 32, 8)
            forward = cpp.norm_act_forward(**values, latent_size=4, pool="max", pool_size=2)
            back = cpp.norm_act_backward(
                torch.ones_like(forward.latents),
                values["conv"],
                forward.mean,
                forward.rstd,
                values["weight"],
                values["bias"],
                forward.mask_sums,
                forward.mask_xhat_sums,
                latent_size=4,
            )
            results.append([*forward, *back])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_output_goes_where_it_is_wanted() -> None:
    values = norm_inputs(3, 6, 4)
    expected = cpp.norm_act_forward(**norm_inputs(3, 6, 4), latent_size=2, pool="max", pool_size=2).output
    out = torch.empty(3, 6, 2, 2)  # contiguous, while the input is channels last
    result = cpp.norm_act_forward(**values, latent_size=2, pool="max", pool_size=2, out=out)
    assert result.output is out
    assert torch.equal(out, expected)


def test_other_dtypes_and_formats_go_to_the_reference() -> None:
    values = norm_inputs(2, 4, 4)
    values["conv"] = values["conv"].contiguous()
    got = cpp.norm_act_forward(**values, latent_size=2)
    again = reference.norm_act_forward(**(norm_inputs(2, 4, 4) | {"conv": values["conv"]}), latent_size=2)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_backward_from_every_activation() -> None:
    values = norm_inputs(3, 12, 6)
    forward = cpp.norm_act_forward(**values, latent_size=0)
    grad = torch.randn_like(values["conv"])
    got = cpp.norm_act_backward_full(grad, values["conv"], forward.mean, forward.rstd, values["weight"], values["bias"])
    truth = [t.double() for t in (grad, values["conv"], forward.mean, forward.rstd, values["weight"], values["bias"])]
    for a, b in zip(got, reference.norm_act_backward_full(*truth), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", [cpp, reference])
@pytest.mark.parametrize("latent_size", [0, 2])
@pytest.mark.parametrize("contiguous", [False, True])  # the C++ kernels hand contiguous images to the reference
def test_the_gradient_may_take_the_place_of_its_input(backend: ModuleType, latent_size: int, contiguous: bool) -> None:
    values = norm_inputs(3, 20, 4)
    if contiguous:
        values["conv"] = values["conv"].contiguous()
    forward = backend.norm_act_forward(**values, latent_size=latent_size)
    common = (values["conv"], forward.mean, forward.rstd, values["weight"], values["bias"])
    if latent_size:
        grad, sums = torch.randn_like(forward.latents), (forward.mask_sums, forward.mask_xhat_sums)
        backward = partial(backend.norm_act_backward, grad, *common, *sums, latent_size=latent_size)
    else:
        backward = partial(backend.norm_act_backward_full, torch.randn_like(values["conv"]), *common)
    apart = backward()
    in_place = backward(out=values["conv"])
    assert in_place[0] is values["conv"]
    assert all(torch.equal(a, b) for a, b in zip(in_place, apart, strict=True))
