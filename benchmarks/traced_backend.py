"""What stands under the workers that `step_trace.py` runs: operations that answer with empty tensors."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unlocked.kernels import reference, triton
from unlocked.kernels.triton import joined as triton_joined
from unlocked.kernels.triton.gelu import gelu_backward_launches, gelu_forward_launch
from unlocked.kernels.triton.max_pool import max_pool_backward_launch, max_pool_forward_launch
from unlocked.kernels.triton.norm_act import Launch
from unlocked.kernels.triton.norm_act_geometry import Geometry, Shape, backward_geometry, forward_geometry
from unlocked.kernels.triton.sum_act import sum_act_backward_launch, sum_act_forward_launch
from unlocked.kernels.triton.weight_grad_geometry import Convolution, weight_grad_geometry

__all__ = ["JOINED", "TracedBackend", "TracedOptimizer", "head_work"]

JOINED = "BatchNorm backward, weight gradient"

_OPTIMIZER_TENSORS = 32  # of one launch of the fused optimizer
_ADAM_WORDS = 7  # parameter, gradient and two moments read; parameter and two moments written
_ADAM_FLOPS = 14
_FLOPS_PER_VALUE = 10  # normalise, affine map, slope, three sums: for the record, it never limits


class Recorder(Protocol):
    """Of launches: see `step_trace.Node`."""

    def add(self, name: str, kind: str, num_bytes: int, flops: int, programs: int, trips: int = 1) -> None:
        """Notes one."""

    def silence(self) -> AbstractContextManager[None]:
        """Inside, nothing is noted by itself."""


def head_work(batch: int, dim: int, rows: int, classes: int, modulation: int) -> tuple[int, int]:
    """(bytes, flops) of `local_head` with a float32 basis [rows, dim]; `modulation` elements are trained."""
    flops = batch * (4 * rows * dim + 8 * dim + 20 * classes + 6 * modulation)
    return 4 * (2 * batch * dim + rows * dim + 3 * modulation) + 8 * batch, flops


class TracedBackend:
    """The operations of `kernels.reference` on meta tensors; notes the launches of the Triton backend."""

    def __init__(self, recorder: Recorder, *, joined: bool) -> None:
        self._recorder = recorder
        own = triton_joined.ABILITIES if joined else triton.ABILITIES
        self.ABILITIES = replace(own, devices=frozenset({"meta"}), optimizers=None, partial_gradients=False)

    def norm_act_forward(self, conv: Tensor, *args: Any, **options: Any) -> reference.NormActResult:
        with self._recorder.silence():
            result = reference.norm_act_forward(conv, *args, **options)
        side = options["latent_size"] if conv.dim() == 4 else min(options["latent_size"], 1)
        geometry = forward_geometry(_shape(conv), side, options["pool"], options["pool_size"])
        written = _size(result.latents, result.output, result.mask_sums, result.mask_xhat_sums)
        self._add_passes("norm_act_forward", geometry, _size(conv), _size(conv), written, conv.numel())
        return result

    def norm_act_backward(self, grad: Tensor, conv: Tensor, *args: Any, **options: Any) -> Any:
        with self._recorder.silence():
            result = reference.norm_act_backward(grad, conv, *args, **options)
        side = options["latent_size"] if conv.dim() == 4 else 1
        small = _size(grad, *args[4:6])
        self._add_passes(
            "norm_act_backward",
            backward_geometry(_shape(conv), side),
            small,
            _size(conv, grad),
            _size(conv),
            conv.numel(),
        )
        return result

    def norm_act_backward_full(self, grad: Tensor, conv: Tensor, *args: Any, **options: Any) -> Any:
        with self._recorder.silence():
            result = reference.norm_act_backward_full(grad, conv, *args, **options)
        both = _size(grad, conv)
        geometry = backward_geometry(_shape(conv), 0)
        self._add_passes("norm_act_backward_full", geometry, both, both, _size(conv), conv.numel())
        return result

    def norm_act_weight_grad(
        self, grad: Tensor, conv: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, mask_sums: Tensor,
        mask_xhat_sums: Tensor, source: Tensor, kernel: Tensor, *, latent_size: int, **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """In the geometry of products on tensor cores. Every column of tiles reads the convolution's output again: that
        comes out of the L2 cache, and is priced as if it came from memory."""
        names = ("stride", "padding", "dilation")
        options.pop("negative_slope")
        convolution = Convolution(source.shape[1:], kernel.shape[2:], *(options.pop(name) for name in names))
        g = weight_grad_geometry(_shape(conv), latent_size, convolution, tf32=True)
        add, partials = self._recorder.add, 4 * g.splits * kernel.numel()
        small = _size(grad, mask_sums, mask_xhat_sums)
        blocks = g.reduction.grid[0] * g.reduction.grid[1]
        add("norm_act_backward: reduction", "fused", small, 5 * small // 4, blocks, 1)
        pixels = g.num_steps * g.constants["BLOCK_Q"] * g.constants["BLOCK_K"]
        flops = 2 * pixels * g.grid[0] * g.constants["BLOCK_N"] * g.grid[1] * g.constants["BLOCK_C"]
        moved = g.grid[0] * _size(conv, grad) + g.grid[1] * _size(source) + partials
        add(JOINED, "conv", moved, flops, g.grid[0] * g.grid[1] * g.splits, 3)
        add("weight gradient's sum", "fused", partials + _size(kernel), partials // 4, g.sum_grid[0], 1)
        return torch.empty_like(kernel), torch.empty_like(weight), torch.empty_like(bias)

    def sum_act_forward(
        self, a: Tensor, b: Tensor, latent_size: int, negative_slope: float, *, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        with self._recorder.silence():
            (y, latents), launch = sum_act_forward_launch(a, b, latent_size, negative_slope, in_place=in_place)
        self._add_launch("sum_act_forward", launch, _size(a, b, y, latents), 4 * y.numel())
        return y, latents

    def sum_act_backward(self, grad: Tensor, y: Tensor, latent_size: int, negative_slope: float) -> Tensor:
        with self._recorder.silence():
            out, launch = sum_act_backward_launch(grad.contiguous(), y, latent_size, negative_slope)
        self._add_launch("sum_act_backward", launch, _size(grad, y, out), out.numel())
        return out

    def gelu_forward(self, x: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
        with self._recorder.silence():
            result, launch = gelu_forward_launch(x, in_place=in_place)
        self._add_launch("gelu_forward", launch, _size(x, *result), 30 * x.numel())
        return result

    def gelu_backward(self, grad: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        repeats = grad.shape[1] if grad.dim() == 3 and grad.stride(1) == 0 else 1
        with self._recorder.silence():
            sums, (first, second) = gelu_backward_launches(grad.contiguous(), slope, repeats)
        partials = first.grid[0] * _size(sums)
        moved = _size(grad) // repeats + 2 * _size(slope) + partials
        self._add_launch("gelu_backward", first, moved, 2 * slope.numel())
        self._add_launch("gelu_backward: sums", second, partials + _size(sums), partials // 4)
        return slope, sums

    def max_pool_forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._recorder.silence():
            result, launch = max_pool_forward_launch(x)
        self._add_launch("max_pool_forward", launch, _size(x, *result), x.numel())
        return result

    def max_pool_backward(self, grad: Tensor, places: Tensor, height: int, width: int) -> Tensor:
        with self._recorder.silence():
            out, launch = max_pool_backward_launch(grad, places, height, width)
        self._add_launch("max_pool_backward", launch, _size(grad, places, out), out.numel())
        return out

    def local_head(self, latents: Tensor, labels: Tensor, basis: Tensor | None, modulation: Any, **options: Any) -> Any:
        with self._recorder.silence():
            result = reference.local_head(latents, labels, basis, modulation, **options)
        batch, dim = latents.shape
        rows = dim if basis is None else basis.shape[0]
        classes = rows if modulation is None else modulation.shape[-1]
        moved, flops = head_work(batch, dim, 0 if basis is None else rows, classes, _count(modulation))
        # Latents, scores, the arrival, the last program's sums.
        self._recorder.add("local_head", "fused", moved, flops, batch, 4)
        if result.basis_grad is not None:
            moved, flops = _size(latents, result.basis_grad), 2 * batch * rows * dim
            self._recorder.add("batch_product", "fused", moved, flops, _divide_up(dim, 32), 3)
        return result

    def _add_launch(self, name: str, launch: Launch, moved: int, flops: int) -> None:
        self._recorder.add(name, "fused", moved, flops, math.prod(launch.grid), 1)

    def _add_passes(self, name: str, geometry: Geometry, reduced: int, read: int, written: int, values: int) -> None:
        flops = _FLOPS_PER_VALUE * values
        if geometry.reduction is not None:
            grid = geometry.reduction.grid
            # About five operations for each float32 that is read.
            self._recorder.add(f"{name}: reduction", "fused", reduced, 5 * reduced // 4, grid[0] * grid[1], 1)
        for index, part in enumerate(geometry.passes):
            # The pass merges the reduction's results (or makes them) before it reads the tensor.
            moved = read + written if index == 0 else read
            self._recorder.add(f"{name}: pass", "fused", moved, flops, part.grid[0] * part.grid[1], 2)


class TracedOptimizer:
    """Counts what the fused optimizer launches."""

    def __init__(self, parameters: Sequence[Tensor], recorder: Recorder) -> None:
        self._parameters, self._recorder = list(parameters), recorder
        self.param_groups: list[dict[str, Any]] = [{"params": self._parameters, "lr": 0.0}]

    def step(self, grads: Any = None) -> None:
        for first in range(0, len(self._parameters), _OPTIMIZER_TENSORS):
            parameters = self._parameters[first : first + _OPTIMIZER_TENSORS]
            values = sum(p.numel() for p in parameters)
            programs = sum(_divide_up(p.numel(), 1024) for p in parameters)
            moved = 4 * _ADAM_WORDS * values
            self._recorder.add("optimizer (Adam)", "fused", moved, _ADAM_FLOPS * values, programs, 2)

    def bfloat16_of(self, parameter: Tensor) -> Tensor:
        """Written by the launch of the step."""
        with self._recorder.silence():
            return parameter.to(torch.bfloat16)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {}


def _shape(conv: Tensor) -> Shape:
    height, width = conv.shape[2:] if conv.dim() == 4 else (1, 1)
    channels_last = conv.stride(1) == 1 and conv.shape[1] > 1
    return Shape(conv.shape[0], conv.shape[1], height, width, channels_last, conv.element_size())


def _size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _count(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
