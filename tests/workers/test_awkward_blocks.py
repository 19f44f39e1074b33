"""Valid blocks with unusual strides, sizes and spellings, beyond what every operation's own tests ask of them."""

from functools import partial
from typing import Any

import pytest
import torch
from awkward_blocks import AWKWARD, Asking
from graph_blocks import CASES, assert_close_to_float64, image, made_layer, seeded, step_of
from torch import nn

from unlocked.kernels import cpp, reference
from unlocked.workers.graph import products


@pytest.mark.parametrize("name", AWKWARD)
def test_by_the_library_alone(name: str) -> None:
    make, x, _ = CASES[name]
    assert_close_to_float64(make, x, reference)


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
