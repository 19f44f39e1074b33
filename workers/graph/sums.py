"""The sum at a residual block's end, with the activation after it and the latents, on a backend's kernels; or the
activation and the latents of one image."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.workers.graph.body import PlainEnd
from unlocked.workers.graph.operations import Gradients

__all__ = ["SumEnd"]

aten = torch.ops.aten


class SumEnd(PlainEnd):
    """Both summands get the same gradient, which is made of the latents' in one pass. What the kernels don't take
    (other shapes or types, a sum that repeats values) goes to the library.

    Args:
        slope: of the leaky ReLU below zero, 1: there is none.
        backend: has `Abilities.sums`, and for one image `Abilities.lone_ends`.
        owns_first: nobody else reads the first summand, so that the result may take its place.
    """

    def __init__(self, *args: Any, slope: float, backend: ModuleType, owns_first: bool) -> None:
        super().__init__(*args)
        self._slope, self._own, self._owns_first = slope, backend, owns_first
        self._made: Tensor | None = None  # the latents, if the kernels made them
        self._shapes: list[torch.Size]

    def forward(self, *images: Tensor, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[B, C, H, W], twice or once -> what leaves the block."""
        a, b = images[0], images[1] if len(images) == 2 else None
        self._made, self._shapes = None, [x.shape for x in images]
        lies = all(x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) for x in images)
        alike = b is None or (a.shape == b.shape and a.dtype == b.dtype)
        if lies and alike and a.dtype in (torch.float32, torch.bfloat16):
            y, self._made = self._own.sum_act_forward(a, b, self._side, self._slope, in_place=self._owns_first)
        else:
            total = a if b is None else a + b
            y = F.relu(total) if self._slope == 0.0 else F.leaky_relu(total, self._slope)
        return super().forward(y, out)

    def latents(self) -> Tensor:
        """[B, C p p]."""
        return super().latents() if self._made is None else self._made

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        activations = self._activations
        assert activations is not None
        if self._made is None:
            (full,), _ = super().backward(grad, wanted)
            given = aten.leaky_relu_backward(full, activations, self._slope, True)
        else:
            given = self._own.sum_act_backward(grad.float(), activations, self._side, self._slope)
        self._activations = self._made = None
        pairs = zip(self._shapes, wanted, strict=True)
        return [given.sum_to_size(shape) if is_wanted else None for shape, is_wanted in pairs], []
