"""The CUDA kernels of a local step one after the other: the same bits each time, also in a graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_cases import needs_gpu, norm_act_inputs, resident_images
from torch import Tensor

from unlocked.kernels import cuda, images, reference


def _local_step(batch: int, device: str) -> tuple[dict[str, Tensor], Callable[[], list[Tensor]]]:
    """State, and one pass through every kernel that changes it and returns all results."""
    inputs = norm_act_inputs((batch, 32, 8, 8), torch.float32, True, device)
    data = {name: tensor.to(device) for name, tensor in resident_images(400, (3, 8, 8)).items()}
    boxes = images.make_erase_boxes(8, 8).to(device)
    basis = reference.make_basis(10, 512).to(device)
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(4)).to(device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    state = {"totals": totals, **{name: inputs[name] for name in ("running_mean", "running_var")}}
    state |= {"start": data["start"], "epoch": data["epoch"]}

    def step() -> list[Tensor]:
        pixels, labels = cuda.load_batch(
            **data, size=batch, seed=1, flip=True, crop_padding=1, erase_probability=0.5, erase_boxes=boxes
        )
        data["start"].add_(batch)
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


def test_repeats_bit_for_bit(cuda_device: str) -> None:
    """Emulated threads and blocks run in another order each time."""
    batch, repetitions = (64, 5) if cuda_device == "cuda" else (9, 1)
    state, step = _local_step(batch, cuda_device)
    start = {name: tensor.clone() for name, tensor in state.items()}
    first = _run_from(state, start, step)
    for _ in range(repetitions):
        assert all(torch.equal(a, b) for a, b in zip(_run_from(state, start, step), first, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_gives_the_same_bits() -> None:
    state, step = _local_step(64, "cuda")
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
