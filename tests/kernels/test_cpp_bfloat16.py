"""The C++ kernels in bfloat16 are those in float32 with what they store rounded once, bit for bit."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlocked.kernels import cpp, reference

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason=f"no C++ backend: {cpp.unavailable('cpu')}")

HALF = torch.bfloat16


def images(shape: tuple[int, ...], generator: torch.Generator, scale: float = 1.0) -> Tensor:
    values = (torch.randn(shape, generator=generator) * scale).to(HALF)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


def vectors(channels: int, generator: torch.Generator) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var", "conv_bias")
    return {name: torch.rand(channels, generator=generator) + 0.5 for name in names}


def same(got: Tensor, expected: Tensor) -> None:
    """Equal bits, but for the payload of a NaN."""
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


# 1e-41: below the normal numbers, which a processor's own conversion would flush; 3e38: rounds up to infinity
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 40),
    windows=st.integers(1, 3),
    window=st.integers(1, 3),
    pool=st.sampled_from(["none", "max", "average"]),
    strange=st.sampled_from([None, float("nan"), float("inf"), 1e-41, 3e38]),
    flat=st.booleans(),
)
@example(batch=2, channels=33, windows=2, window=2, pool="max", strange=float("nan"), flat=False)
@settings(max_examples=60, deadline=None)
def test_forward_and_backward_round_once(
    batch: int, channels: int, windows: int, window: int, pool: str, strange: float | None, flat: bool
) -> None:
    side = 1 if flat else windows * window
    generator = torch.Generator().manual_seed(batch * 1009 + channels * 31 + side)
    conv = images((batch, channels) if flat else (batch, channels, side, side), generator)
    if strange is not None:
        conv[(0,) * conv.dim()] = strange
    options = {
        "latent_size": channels if flat else windows,
        "pool": "none" if flat or side < 2 else pool,
        "pool_size": windows,
    }
    parameters = vectors(channels, generator)
    half = cpp.norm_act_forward(conv, **{k: v.clone() for k, v in parameters.items()}, **options)
    full = cpp.norm_act_forward(conv.float(), **{k: v.clone() for k, v in parameters.items()}, **options)
    for name in ("mean", "rstd", "mask_sums", "mask_xhat_sums"):
        same(getattr(half, name), getattr(full, name))
    same(half.latents, full.latents.to(HALF))
    same(half.output, full.output.to(HALF))

    grad = images(tuple(half.latents.shape), generator)
    norm = (half.mean, half.rstd, parameters["weight"], parameters["bias"])
    sums = (half.mask_sums, half.mask_xhat_sums)
    latent_size = options["latent_size"]
    got = cpp.norm_act_backward(grad, conv, *norm, *sums, latent_size=latent_size)
    expected = cpp.norm_act_backward(grad.float(), conv.float(), *norm, *sums, latent_size=latent_size)
    same(got[0], expected[0].to(HALF))
    for a, b in zip(got[1:], expected[1:], strict=True):
        same(a, b)

    grad = images(tuple(conv.shape), generator, scale=3.0)
    got = cpp.norm_act_backward_full(grad, conv, *norm)
    expected = cpp.norm_act_backward_full(grad.float(), conv.float(), *norm)
    same(got[0], expected[0].to(HALF))
    for a, b in zip(got[1:], expected[1:], strict=True):
        same(a, b)


def test_a_slot_in_another_memory_format_and_the_input_as_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    conv, parameters = images((3, 20, 4, 4), generator), vectors(20, generator)
    expected = cpp.norm_act_forward(conv, **{k: v.clone() for k, v in parameters.items()}, latent_size=2, pool="max")
    slot = torch.empty(3, 20, 2, 2, dtype=HALF)
    got = cpp.norm_act_forward(conv, **parameters, latent_size=2, pool="max", out=slot)
    assert got.output is slot
    same(slot, expected.output)
    grad = images((3, 80), generator)
    arguments = (conv, got.mean, got.rstd, parameters["weight"], parameters["bias"], got.mask_sums, got.mask_xhat_sums)
    apart = cpp.norm_act_backward(grad, *arguments, latent_size=2)
    in_place = cpp.norm_act_backward(grad, *arguments, latent_size=2, out=conv)
    assert in_place[0] is conv
    same(in_place[0], apart[0])


@pytest.mark.parametrize("modulation", [None, (4,), (4, 4)])
def test_the_head_computes_in_float32(modulation: tuple[int, ...] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = images((6, 24), generator)
    labels = torch.randint(4, (6,), generator=generator)
    basis = torch.randn(4, 24, generator=generator)
    weights = None if modulation is None else torch.randn(modulation, generator=generator)
    got = cpp.local_head(latents, labels, basis, weights)
    expected = cpp.local_head(latents.float(), labels, basis, weights)
    same(got.latents_grad, expected.latents_grad.to(HALF))
    same(got.loss_sum, expected.loss_sum)
    truth = reference.local_head(
        latents.double(), labels, basis.double(), None if weights is None else weights.double()
    )
    # rounded once to 8 bits of mantissa
    torch.testing.assert_close(got.latents_grad.double(), truth.latents_grad, rtol=2**-8, atol=1e-6)
