"""GroupNorm by autograd on a CPU, of images that nobody wants a gradient of.

torch 2.13 writes the gradient of a channels-last input although it was not asked for, to memory that is not there, and
the process ends. A block's input is such a one, and so is whatever frozen parts make of it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["GroupNormGuard"]


class GroupNormGuard:
    """Of one block: `active()` is what its forward passes run in. The first of them shows whether it has a GroupNorm at
    all; a block without one pays nothing afterwards."""

    def __init__(self, device: str) -> None:
        self._mode = _Asking() if device == "cpu" else None

    @contextlib.contextmanager
    def active(self, asked: list[Tensor] | None = None) -> Iterator[None]:
        """
        Args:
            asked: gets what has a gradient only for this: torch.autograd.grad must be asked for it.
        """
        mode = self._mode
        if mode is None or (mode.is_tried and not mode.is_needed):
            yield
            return
        mode.is_tried, mode.asked = True, asked
        try:
            with mode:
                yield
        finally:
            mode.asked = None  # a micro-batch outlives no update


class _Asking(TorchFunctionMode):
    """Every GroupNorm's input has a gradient, wanted or not."""

    is_tried = is_needed = False
    asked: list[Tensor] | None = None

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (F.group_norm, torch.group_norm):
            self.is_needed = True
            if args:
                args = (self._with_gradient(args[0]), *args[1:])
            else:
                kwargs = {**(kwargs or {}), "input": self._with_gradient((kwargs or {})["input"])}
        return function(*args, **(kwargs or {}))

    def _with_gradient(self, x: Tensor) -> Tensor:
        if x.requires_grad or _lies_plainly(x) or not torch.is_grad_enabled():
            return x
        x = x.detach().requires_grad_()
        if self.asked is not None:
            self.asked.append(x)
        return x


def _lies_plainly(x: Tensor) -> bool:
    """Contiguous, and nothing that torch may take for channels-last: of one channel or one pixel it may be both."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    ambiguous = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return x.is_contiguous() and not ambiguous
