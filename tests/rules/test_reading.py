"""What rules read of activations, and its gradients, against the library's own modules in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.kernels.reference import pool_latents
from unlocked.rules import InfoPro, LayerInfo
from unlocked.rules.reading import ConvOfEnlarged, read_latents

SIDES = st.integers(1, 9)


@given(SIDES, SIDES, st.integers(1, 5), st.booleans())
def test_latents_are_pooled_and_their_gradient_is_spread(height: int, width: int, side: int, together: bool) -> None:
    layout = torch.channels_last if together else torch.contiguous_format
    maps = torch.randn(3, 20, height, width).contiguous(memory_format=layout).requires_grad_()
    exact = maps.detach().double().requires_grad_()
    latents, expected = read_latents(maps, side), F.adaptive_avg_pool2d(exact, side).flatten(1)
    assert torch.equal(latents, pool_latents(maps, side))
    weights = torch.randn_like(latents)
    (grad,) = torch.autograd.grad((latents * weights).sum(), maps)
    (of_exact,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    torch.testing.assert_close(grad.double(), of_exact, rtol=1e-6, atol=1e-6)
    assert grad.is_contiguous(memory_format=layout)
    (of_library,) = torch.autograd.grad((pool_latents(maps, side) * weights).sum(), maps)
    assert torch.equal(grad, of_library)


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from([torch.float64, torch.float32]))
def test_a_convolution_of_enlarged_maps(height: int, width: int, higher: int, wider: int, dtype: torch.dtype) -> None:
    """Also after a change of type, as `.double()` of a rule makes one; twice, as it keeps its matrices."""
    size = (height + higher - 1, width + wider - 1)
    conv = ConvOfEnlarged(5, 2, (height, width), size).to(dtype)
    plain = nn.Sequential(nn.Upsample(size, mode="bilinear", align_corners=True), nn.Conv2d(5, 2, 3, padding=1))
    plain[1].load_state_dict(conv.state_dict())
    plain.double()
    for _ in range(2):
        maps = torch.randn(3, 5, height, width, dtype=dtype, requires_grad=True)
        same = maps.detach().double().requires_grad_()
        made, expected = conv(maps), plain(same)
        weights = torch.randn_like(expected)
        grads = torch.autograd.grad((made * weights.to(made)).sum(), [maps, *conv.parameters()])
        of_plain = torch.autograd.grad((expected * weights).sum(), [same, *plain.parameters()])
        close = 1e-4 if made.dtype == torch.float32 else 1e-10
        for one, other in zip((made, *grads), (expected, *of_plain), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=close, atol=close)


@pytest.mark.parametrize("side", [3, 6, 7, 16])
def test_info_pro_reconstructs_images_smaller_and_larger_than_the_maps(side: int) -> None:
    """Its decoder is the two convolutions of the maps resized to the image, whatever that size is."""
    image = min(side, 12)
    layer = LayerInfo(
        name="conv",
        index=0,
        activation_shape=(4, 6, 6),
        num_classes=3,
        latent_size=2,
        hidden=8,
        reduced_rank=3,
        seed=7,
        input_shape=(2, 12, 12),
    )
    decoder = InfoPro(layer, side=side).double().decoder
    maps = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    large = F.interpolate(maps, (image, image), mode="bilinear", align_corners=True)
    convs = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    hidden = F.batch_norm(_plainly(convs[0], large), None, None, training=True).clamp_min(0)
    torch.testing.assert_close(decoder(maps), _plainly(convs[1], hidden))
    assert decoder(maps).shape == (5, 2, image, image)


def _plainly(conv: nn.Conv2d, maps: Tensor) -> Tensor:
    return F.conv2d(maps, conv.weight, conv.bias, padding=1)


def test_latents_stand_what_the_library_s_stand() -> None:
    """Gradients of gradients, writing into them, and functional transforms."""
    maps = torch.randn(3, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda a: read_latents(a, 2).square(), maps)
    for side in (1, 2):
        latents = read_latents(maps, side)
        latents -= latents.mean(0)
        torch.testing.assert_close(latents, pool_latents(maps, side) - pool_latents(maps, side).mean(0))
    found = torch.func.grad(lambda a: read_latents(a, 2).sin().sum())(maps)
    torch.testing.assert_close(found, torch.func.grad(lambda a: pool_latents(a, 2).sin().sum())(maps))
    each = torch.func.vmap(torch.func.grad(lambda a: read_latents(a[None], 2).sin().sum()))(maps)
    torch.testing.assert_close(each, found)
