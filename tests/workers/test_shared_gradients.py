"""Gradients that all tokens share, as one row each: equal to those of as many rows, within float32's rounding."""

import pytest
import torch
from graph_blocks import CASES, made_layer, step_of
from torch import Tensor

from unlocked.kernels import cpp, reference
from unlocked.workers.graph import products
from unlocked.workers.graph.body import PlainEnd
from unlocked.workers.graph.operations import Gradients


def _shared(batch: int, tokens: int, width: int) -> Tensor:
    return torch.randn(batch, 1, width, generator=torch.Generator().manual_seed(0)).expand(-1, tokens, -1)


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_the_gradients_of_a_product(tokens: int) -> None:
    grad, x, weight = _shared(4, tokens, 6), torch.randn(4, tokens, 5), torch.randn(6, 5)
    full = grad.contiguous()
    for found, expected in (
        (products.input_gradient(grad, weight), full @ weight),
        (products.weight_gradient(grad, x), full.flatten(0, 1).T @ x.flatten(0, 1)),
        (products.bias_gradient(grad), full.sum((0, 1))),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_input_s_gradient_is_shared_again() -> None:
    assert products.input_gradient(_shared(4, 9, 6), torch.randn(6, 5)).stride(1) == 0


@pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_reads_one_row_for_many(dtype: torch.dtype) -> None:
    grad = _shared(3, 70, 20).to(dtype)[:, :1].expand(-1, 70, -1)
    _, slope = cpp.gelu_forward(torch.randn(3, 70, 20).to(dtype))
    expected = cpp.gelu_backward(grad.contiguous(), slope.clone())
    found = cpp.gelu_backward(grad, slope)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", [cpp, reference])
@pytest.mark.parametrize("name", ["encoder", "encoder's layer", "encoder's layer, norms after", "parameter", "chunks"])
def test_a_step_s_result_is_that_of_full_gradients(name: str, backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    make, x, _ = CASES[name]
    layers = [made_layer(make(), x, backend) for _ in range(2)]
    step_of(layers[0], x)
    original = PlainEnd.backward

    def full(self: PlainEnd, grad: Tensor, wanted: list[bool]) -> Gradients:
        inputs, parameters = original(self, grad, wanted)
        assert inputs[0] is not None
        assert inputs[0].stride(1) == 0  # so that the first layer's were shared
        return [inputs[0].contiguous()], parameters

    monkeypatch.setattr(PlainEnd, "backward", full)
    step_of(layers[1], x)
    for (key, a), (_, b) in zip(layers[0].tensors(), layers[1].tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
