"""All CUDA kernels of a local step, one after the other: the same bits each time and in a graph. On a GPU only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import DEVICE, norm_act_inputs, resident_images
from torch import Tensor

from unlocked.kernels import cuda, images, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _local_step() -> tuple[dict[str, Tensor], Callable[[], list[Tensor]]]:
    """State, and one pass through every kernel that changes it and returns all results."""
    inputs = norm_act_inputs((64, 32, 8, 8), torch.float32, True)
    data = {name: tensor.to(DEVICE) for name, tensor in resident_images(400, (3, 8, 8)).items()}
    boxes = images.make_erase_boxes(8, 8).to(DEVICE)
    basis = reference.make_basis(10, 512).to(DEVICE)
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    totals = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    state = {"totals": totals, **{name: inputs[name] for name in ("running_mean", "running_var")}}
    state |= {"start": data["start"], "epoch": data["epoch"]}

    def step() -> list[Tensor]:
        pixels, labels = cuda.load_batch(
            **data, size=64, seed=1, flip=True, crop_padding=1, erase_probability=0.5, erase_boxes=boxes
        )
        data["start"].add_(64)
        data["epoch"].add_(1)
        forward = cuda.norm_act_forward(**inputs, latent_size=4, pool="max")
        head = cuda.local_head(forward.latents, labels, basis, matrix, basis_gradient=True, totals=totals)
        saved: dict[str, Any] = {
            "mean": forward.mean,
            "rstd": forward.rstd,
            "weight": inputs["weight"],
            "bias": inputs["bias"],
        }
        sums: dict[str, Any] = {"mask_sums": forward.mask_sums, "mask_xhat_sums": forward.mask_xhat_sums}
        backward = cuda.norm_act_backward(head.latents_grad, inputs["conv"], **saved, **sums, latent_size=4)
        full = cuda.norm_act_backward_full(backward[0], inputs["conv"], **saved)
        results = [pixels, labels, *forward, *head, *backward, *full]
        return [tensor for tensor in results if tensor is not None]

    return state, step


def _run_from(state: dict[str, Tensor], start: dict[str, Tensor], run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Three runs from the same state: all results and the final state."""
    for name, tensor in state.items():
        tensor.copy_(start[name])
    results = [tensor.clone() for _ in range(3) for tensor in run()]
    return results + [tensor.clone() for tensor in state.values()]


def test_repeats_bit_for_bit() -> None:
    state, step = _local_step()
    start = {name: tensor.clone() for name, tensor in state.items()}
    first = _run_from(state, start, step)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(_run_from(state, start, step), first, strict=True))


def test_a_captured_graph_gives_the_same_bits() -> None:
    state, step = _local_step()
    start = {name: tensor.clone() for name, tensor in state.items()}
    eager = _run_from(state, start, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    assert all(torch.equal(a, b) for a, b in zip(_run_from(state, start, replay), eager, strict=True))
    assert eager[-5][1] != start["totals"][1]  # the totals did advance
