"""Valid blocks with unusual strides, sizes and spellings, beyond what every operation's own tests ask of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from awkward_blocks import AWKWARD, Asking
from graph_blocks import CASES, assert_close_to_float64, image, made_layer, seeded, step_of
from torch import Tensor, nn

from unlocked.kernels import cpp, reference
from unlocked.workers.graph import products


@pytest.mark.parametrize("name", AWKWARD)
def test_by_the_library_alone(name: str) -> None:
    make, x, _ = CASES[name]
    assert_close_to_float64(make, x, reference)


class Apart(nn.Module):
    """A function's several results, of which one is read before another is taken out of them."""

    def __init__(self, function: Callable[[Tensor], Any], *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.function, self.twice = nn.Linear(12, 12), function, twice
        self.second, self.third = _maps()

    def forward(self, x: Tensor) -> Tensor:
        parts = self.function(self.first(x))
        result = self.second(parts[0])
        if self.twice:
            result = torch.tanh(self.second(parts[0] * parts[1])) + result
        return torch.tanh(self.third(parts[1])) + result


class Slanted(nn.Module):
    """A leaky ReLU whose slope is a buffer."""

    def __init__(self, *, named: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last, self.named = nn.Linear(12, 8), nn.Identity() if last else nn.Linear(8, 8), named
        self.register_buffer("slope", torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        leaky: Any = nn.functional.leaky_relu
        y = self.first(x)
        return self.last(leaky(y, negative_slope=self.slope) if self.named else leaky(y, self.slope))


class Numbered(nn.Module):
    """Adds a number that follows from sizes."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.number = nn.Linear(12, 8), nn.Linear(8, 8), number

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.tanh(y + self.number(y)))


class Recurrent(nn.Module):
    """Its output and, later, its last cells, which stand in a tuple inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net, self.second, self.third = nn.Linear(12, 12), nn.LSTM(12, 6), *_maps()

    def forward(self, x: Tensor) -> Tensor:
        found = self.net(self.first(x))
        result = self.second(found[0])
        return torch.tanh(self.third(found[1][1])) + result


def _maps() -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.Linear(6, 8)]


LEFT: dict[str, Callable[[], nn.Module]] = {
    "a split by name": lambda: Apart(lambda y: torch.chunk(input=y, chunks=2, dim=-1)),
    "parts": lambda: Apart(lambda y: torch.tensor_split(y, 2, -1)),
    "parts, one of them twice": lambda: Apart(lambda y: torch.tensor_split(y, 2, -1), twice=True),
    "values and indices": lambda: Apart(lambda y: (y.sort(-1)[0][:, :6], y[:, 6:])),
    "a size added": lambda: Numbered(lambda y: y.shape[1]),
    "a recurrent net": Recurrent,
    "a count added": lambda: Numbered(lambda y: y.numel()),
    **{
        f"a slope, named={named}, last={last}": partial(Slanted, named=named, last=last)
        for named in (False, True)
        for last in (False, True)
    },
}


@pytest.mark.parametrize("backend", [cpp, reference])
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_autograd_has_all_its_gradients(name: str, backend: Any) -> None:
    tested = assert_close_to_float64(seeded(LEFT[name], latent_size=8), image(12), backend)
    assert "autograd" in {how for how, _, _ in tested.step.body.rows}


@pytest.mark.parametrize("backend", [cpp, reference])
def test_learned_queries_may_be_expanded(backend: Any) -> None:
    """By autograd: `expand` is not in the table."""
    make = seeded(partial(Asking, 16, 1, 2, heads=2, expanded=True), layout="tokens")
    assert_close_to_float64(make, image(16, 16), backend)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
@pytest.mark.parametrize("bias", [lambda: torch.randn(96, 2)[:, 0], lambda: torch.randn(1).expand(96), lambda: None])
@pytest.mark.parametrize("lies", [True, False])
def test_products_by_onednn_take_any_strides(bias: Any, lies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_prefers_onednn", lambda: True)
    x, weight, added = torch.randn(6, 64, 128), torch.randn(96, 128), bias()
    if not lies:
        x, weight = torch.randn(6, 128, 64).transpose(1, 2), torch.randn(96, 256)[:, ::2]
    expected = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(products.product(x, weight, added).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in AWKWARD if "learned" in name or "head" in name or "few" in name])
def test_attention_in_bfloat16_stays_near(name: str) -> None:
    make, x, _ = CASES[name]
    single, half = (made_layer(make(), x, cpp, precision=precision) for precision in ("fp32", "bf16"))
    before = [p.detach().clone() for p in single.parameters]
    outputs = [step_of(layer, x).float() for layer in (single, half)]
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.03
    for start, a, b in zip(before, single.parameters, half.parameters, strict=True):
        if float((a.detach() - start).norm()) > 1e-3:
            assert float((b - a).detach().norm() / (a.detach() - start).norm()) < 0.25


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "3.weight", "3.bias"])
def test_what_is_frozen_has_no_copy_of_the_optimizers(frozen: str) -> None:
    """In bfloat16, with one optimizer for all that trains."""
    triton = pytest.importorskip("unlocked.kernels.triton")

    def make() -> nn.Module:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12))
        net.get_parameter(frozen).requires_grad_(False)
        return net

    block, x = seeded(make, latent_size=12), image(3, 6, 6)
    fused, plain = (made_layer(block(), x, backend, precision="bf16") for backend in (triton, reference))
    assert hasattr(fused.optimizer, "bfloat16_of")
    for _ in range(2):  # the second reads the copies that the first has left
        outputs = [step_of(layer, x).float() for layer in (fused, plain)]
        torch.testing.assert_close(*outputs, rtol=0.03, atol=0.03)
    for (name, value), (_, expected) in zip(fused.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0.03, atol=0.03, msg=name)
