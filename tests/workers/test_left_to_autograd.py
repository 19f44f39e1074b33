"""Blocks that can't be had as a list of operations, as a whole or in part: autograd, equal results, and a reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_blocks import made_layer, step_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from unlocked.kernels import cpp
from unlocked.models import Block
from unlocked.workers.fused import FusedStep
from unlocked.workers.layer import AutogradStep


class _Own(nn.Module):
    """A convolution, and whatever is done with what it gives."""

    def __init__(self, more: Callable[["_Own", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.relu, self.seen = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), 0
        self.unused = nn.Linear(2, 2) if more is _unused else None
        self.register_buffer("count", torch.zeros(()))
        self.shapes: list[torch.Size] = []
        self._more = more

    def forward(self, x: Tensor) -> Tensor:
        return self._more(self, self.conv(x))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad  # so that nothing but itself gives this


def _branches(m: _Own, y: Tensor) -> Tensor:
    return y if y.mean() > 0 else -y


def _counts(m: _Own, y: Tensor) -> Tensor:
    m.seen += 1
    return y * m.seen


def _fills(m: _Own, y: Tensor) -> Tensor:
    m.count += 1
    return y * m.count


def _keeps(m: _Own, y: Tensor) -> Tensor:
    m.last = y
    return y.relu()


def _collects(m: _Own, y: Tensor) -> Tensor:
    m.shapes.append(y.shape)
    return y.relu()


def _reads_again(m: _Own, y: Tensor) -> Tensor:
    return m.relu(y) + y


def _writes_a_view(m: _Own, y: Tensor) -> Tensor:
    flat = y.flatten(2)
    return flat.mul_(2).unflatten(2, y.shape[2:])


def _writes_a_part(m: _Own, y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y


def _asks_for_a_type(m: _Own, y: Tensor) -> Tensor:
    return y if isinstance(y, Tensor) else -y


def _unused(m: _Own, y: Tensor) -> Tensor:
    return y.relu()


def _makes_a_tensor(m: _Own, y: Tensor) -> Tensor:
    return y * torch.tensor(2.0)


def _partly_without_gradients(m: _Own, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = y.relu()
    return y * scale


def _without_autocast(m: _Own, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y.relu()


def _hooked(which: str) -> nn.Module:
    width = 8 if which == "part" else 3
    net = nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    if which == "parameter":
        net[0].weight.register_hook(lambda grad: 2 * grad)
    else:
        (net if which == "whole" else net[0]).register_forward_hook(lambda module, inputs, output: 2 * output)
    return net


WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "data decides": (lambda: _Own(_branches), "data decides what its forward() runs"),
    "counts": (lambda: _Own(_counts), "its forward() changes seen"),
    "fills": (lambda: _Own(_fills), "its forward() changes count"),
    "collects": (lambda: _Own(_collects), "its forward() changes shapes"),
    "keeps": (lambda: _Own(_keeps), "its forward() changes last"),
    "reads again": (lambda: _Own(_reads_again), "changes in place what is read elsewhere"),
    "writes a view": (lambda: _Own(_writes_a_view), "changes in place what"),
    "writes a part": (lambda: _Own(_writes_a_part), "torch.fx can't follow its forward()"),
    "unused": (lambda: _Own(_unused), "its result does not depend on unused.weight, unused.bias"),
    "asks for a type": (lambda: _Own(_asks_for_a_type), "it does not compute what was traced"),
    "makes a tensor": (lambda: _Own(_makes_a_tensor), "makes a tensor that depends on no input"),
    "own function": (lambda: _Own(lambda m, y: _Double.apply(y)), "the autograd function _Double has a way back"),
    "without gradients": (lambda: _Own(_partly_without_gradients), "switches gradients or autocast"),
    "without autocast": (lambda: _Own(_without_autocast), "switches gradients or autocast"),
    "hooked parameter": (lambda: _hooked("parameter"), "hooks are set on 0.weight"),
    "hooked as a whole": (lambda: _hooked("whole"), "hooks are set on it"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_block_that_is_left_to_autograd_as_a_whole(name: str) -> None:
    make, why = WHOLE[name]
    found = []
    for backend in (cpp, None):
        torch.manual_seed(0)
        body = make()
        layer = made_layer(
            Block("layer", body, latent_size=2), torch.randn(6, 3, 8, 8), backend, sample=torch.randn(2, 3, 8, 8)
        )
        assert type(layer.step) is AutogradStep
        if backend is not None:
            assert re.search(re.escape(why), layer.step.why), layer.step.why
        torch.manual_seed(1)
        x = torch.randn(6, 3, 8, 8)
        outputs = [step_of(layer, x) for _ in range(3)]
        found.append([*outputs, *(value for _, value in layer.tensors())])
        if isinstance(body, _Own):
            found[-1].append(torch.tensor(body.seen))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def _with(*modules: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *(make() for make in modules))


def _frozen_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.running_mean = torch.linspace(-1, 1, 8)
    return norm.requires_grad_(False)


PARTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrised": (
        _with(lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
        "2: its weights are parametrised",
    ),
    "hooked": (_with(lambda: _hooked("part"), lambda: nn.Conv2d(8, 4, 1)), "hooks are set on it"),
    "padded by name": (_with(lambda: nn.Conv2d(8, 8, 3, padding="same")), "it pads by 'same'"),
    "padded by circles": (_with(lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")), "it pads by circular"),
    "frozen norm": (_with(_frozen_norm, lambda: nn.Conv2d(8, 8, 1)), "it is kept in eval mode"),
    "norm without weights": (_with(lambda: nn.BatchNorm2d(8, affine=False), nn.ReLU), "a BatchNorm without weights"),
    "not in the table": (
        _with(lambda: nn.InstanceNorm2d(8), lambda: nn.PReLU(8)),
        "InstanceNorm2d is not in the table",
    ),
    "several values": (lambda: _Own(lambda m, y: torch.cat(y.chunk(2, 1)[::-1], 1)), "chunk is not in the table"),
    "sizes": (lambda: _Own(lambda m, y: y.roll(y.shape[3] // 2, 3) * y.size(1)), "roll is not in the table"),
    "written inside": (lambda: _Own(lambda m, y: F.threshold(y, 0.1, 0.0, True)), "threshold is not in the table"),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_that_is_left_to_autograd(name: str) -> None:
    """The rest is closed; the result is autograd's to the last digits, and so are the counts."""
    make, why = PARTS[name]
    layers = []
    for backend in (cpp, None):
        torch.manual_seed(0)
        body = make()
        layers.append(made_layer(Block("layer", body, latent_size=2), torch.randn(6, 3, 8, 8), backend))
    assert isinstance(layers[0].step, FusedStep)
    rows = layers[0].step.body.rows
    assert any(how == "closed" for how, _, _ in rows)
    assert why in "; ".join(text for how, _, text in rows if how == "autograd")
    torch.manual_seed(1)
    for x in torch.randn(3, 6, 3, 8, 8):
        outputs = [step_of(layer, x.contiguous(memory_format=torch.channels_last)) for layer in layers]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for (key, a), (_, b) in zip(*(layer.tensors() for layer in layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")  # type: ignore[misc]


def test_a_module_that_leaves_a_gradient_out_trains_as_it_does_in_torch() -> None:
    """The optimizer then is torch's own, which skips what has none."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.calls = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2)), 0
            self.register_forward_hook(lambda module, inputs, output: None)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.parts[self.calls % 2](x)

    layers = []
    for backend in (cpp, None):
        torch.manual_seed(0)
        layers.append(made_layer(Block("layer", _with(Either)(), latent_size=2), torch.randn(6, 3, 8, 8), backend))
    assert isinstance(layers[0].step, FusedStep)
    assert isinstance(layers[0].optimizer, torch.optim.Optimizer)
    torch.manual_seed(1)
    for x in torch.randn(3, 6, 3, 8, 8):
        for layer in layers:
            step_of(layer, x)
    for (key, a), (_, b) in zip(*(layer.tensors() for layer in layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")  # type: ignore[misc]


def _watched(layer: nn.Module) -> nn.Module:
    layer.self_attn.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, F.silu, batch_first=True),
        lambda: _watched(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)),
    ],
)
def test_an_encoders_layer_that_is_more_than_its_parts_stays_whole(make: Callable[[], nn.Module]) -> None:
    """Attention draws, rows are other samples', the function has no entry, somebody looks on."""
    torch.manual_seed(0)
    layer = made_layer(Block("layer", make(), layout="tokens"), torch.randn(6, 5, 8), cpp)
    assert isinstance(layer.step, AutogradStep)
    assert "TransformerEncoderLayer is not in the table" in layer.step.why
