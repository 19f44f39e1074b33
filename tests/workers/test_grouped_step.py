"""GroupNorm in a block's step: what joins it, what it keeps, and what goes to the library."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from graph_blocks import CASES, assert_close_to_float64, made_layer, step_of
from torch import Tensor, nn
from torch.nn import functional as F

from unlocked.kernels import cpp, reference
from unlocked.kernels.reference import pool_latents
from unlocked.models import Block
from unlocked.workers.graph import grouped, operations

pytestmark = pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")


class _Own(nn.Module):
    """A GroupNorm, and whatever is done with what it gives."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self._then = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), then

    def forward(self, x: Tensor) -> Tensor:
        return self._then(self.norm(self.conv(x)))


def _block(then: Callable[[Tensor], Tensor], *, hooked: bool = False, frozen: bool = False) -> Block:
    torch.manual_seed(0)
    own = _Own(then)
    if hooked:
        own.norm.register_forward_hook(lambda *_: None)
    if frozen:
        own.norm.requires_grad_(False).eval()
    return Block("layer", own, latent_size=2)


def _input() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize(
    ("then", "named"),
    [
        (F.silu, "silu"),
        (lambda y: F.silu(y, inplace=True), "silu"),
        (F.gelu, "gelu"),
        (F.relu, "relu"),
        (lambda y: F.leaky_relu(y, 0.3), "leaky_relu"),
        (torch.relu, "relu"),
    ],
)
def test_functions_join_as_modules_do(then: Callable[[Tensor], Tensor], named: str) -> None:
    tested = assert_close_to_float64(lambda: _block(then), _input(), cpp)
    assert tested.step.body.rows[-1] == ("joined", ("norm", named, "latents"), "in one pass each way")


@pytest.mark.parametrize(
    ("then", "covered"),
    [
        (lambda y: F.gelu(y, approximate="tanh"), ("norm",)),
        (torch.tanh, ("norm",)),
        (lambda y: y + F.silu(y), ("norm",)),
        (lambda y: F.silu(y) + 1.0 * y.mean(), ("norm",)),
        (lambda y: (torch.tanh(y), F.silu(y))[1], ("norm",)),
        (lambda y: torch.relu(input=y), ("norm",)),
    ],
)
def test_others_stay_apart(then: Callable[[Tensor], Tensor], covered: tuple[str, ...]) -> None:
    tested = assert_close_to_float64(lambda: _block(then), _input(), cpp)
    assert ("closed", covered, "") in tested.step.body.rows


def test_who_looks_on_is_left_to_autograd() -> None:
    tested = assert_close_to_float64(lambda: _block(F.silu, hooked=True), _input(), cpp)
    assert any(how == "autograd" and "hooks" in why for how, _, why in tested.step.body.rows)


def test_a_frozen_norm_normalises_all_the_same() -> None:
    """It has no running statistics."""
    tested = assert_close_to_float64(lambda: _block(F.silu, frozen=True), _input(), cpp)
    assert isinstance(tested.step.body.end, grouped.GroupedEnd)


@pytest.mark.parametrize("backend", [cpp, reference])
def test_the_backend_says_whether_it_has_it(backend: ModuleType) -> None:
    tested = assert_close_to_float64(CASES["group"][0], _input(), backend)
    kinds = {type(call.operation) for call in tested.step.body.calls}
    assert (grouped.Grouped in kinds) == backend.ABILITIES.groups
    assert (operations.GroupNorm in kinds) != backend.ABILITIES.groups


def test_an_image_in_another_order_is_turned_and_stays_as_it_was() -> None:
    """The first operation of a block, whose input is somebody else's."""

    def make() -> Block:
        torch.manual_seed(0)
        return Block("layer", nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 8, 3)), latent_size=2)

    x = torch.randn(6, 4, 8, 8)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        kept = images.clone()
        layer = made_layer(make(), images, cpp)
        step_of(layer, images)
        assert torch.equal(images, kept)
    assert_close_to_float64(make, x, cpp)


@pytest.mark.parametrize("name", ["group", "group, SiLU, at the end", "group, windows that overlap"])
def test_other_types_go_to_the_library(name: str) -> None:
    make, x, _ = CASES[name]
    layer = made_layer(make(), x, cpp)
    block, body, exact = layer.block.double(), layer.step.body, x.double()
    expected = block.body(exact)
    latents = pool_latents(expected, layer.info.latent_size)
    grad = torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_parameters = torch.autograd.grad(latents, body.trained, grad)
    torch.testing.assert_close(body.forward(exact, None), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(body.latents(), latents.detach(), rtol=1e-12, atol=1e-12)
    for found, wanted in zip(body.backward(grad), of_parameters, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["group", "group, SiLU, at the end", "group with a tail", "group of rows"])
def test_nothing_of_a_micro_batch_outlives_its_update(name: str) -> None:
    make, x, _ = CASES[name]
    layer = made_layer(make(), x, cpp)
    step_of(layer, x)
    step_of(layer, x)
    body = layer.step.body
    all_operations = [*(call.operation for call in body.calls), body.end]
    all_operations += [one._inside for one in all_operations if isinstance(one, grouped.GroupedEnd)]
    found = [value for operation in all_operations for value in vars(operation).values()]
    parts = [one for value in found for one in (value if isinstance(value, tuple) else (value,))]
    tensors = [one for one in parts if isinstance(one, Tensor) and not isinstance(one, nn.Parameter)]
    assert [one.shape for one in tensors if one.numel() >= len(x) * 8] == []


@pytest.mark.parametrize("name", ["group, SiLU, at the end", "group"])
def test_threads_change_no_bit_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, _ = CASES[name]
    found = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        layer = made_layer(make(), x, cpp)
        found.append([step_of(layer, x), *(value for _, value in layer.tensors())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
