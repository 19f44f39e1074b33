"""Convolutions of a rule's own modules on a backend that has them, as the block's are."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["convolving"]


@contextlib.contextmanager
def convolving(backend: ModuleType | None) -> Iterator[None]:
    """Inside, `torch.nn.functional.conv2d` is the backend's, if that has one of its own (`Abilities.convolutions`)."""
    if backend is None or not backend.ABILITIES.convolutions:
        yield
        return
    with _Convolving(backend):
        yield


class _Convolving(TorchFunctionMode):
    def __init__(self, backend: ModuleType) -> None:
        super().__init__()
        self._backend = backend

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.conv2d:
            made = self._convolved(*args, **(kwargs or {}))
            if made is not None:
                return made
        return function(*args, **(kwargs or {}))

    def _convolved(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """The result; None: the library's, which also says what does not fit."""
        sizes = (stride, padding, dilation)
        if input.dim() != 4 or weight.dim() != 4 or isinstance(padding, str) or not _is_plain(input, weight, bias):
            return None
        geometry = tuple(_pair(one) for one in sizes)
        if not self._backend.takes_convolution(weight.shape[1], weight.shape[0], weight.shape[2:], *geometry, groups):
            return None
        result: Tensor = _Convolution.apply(self._backend, input, weight, bias, (*geometry, groups))
        return result


def _is_plain(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Sizes fit, all is float32 on a CPU, and nothing but autograd looks on."""
    given = [input, weight] if bias is None else [input, weight, bias]
    fits = input.shape[1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if not fits or any(one.dtype != torch.float32 or one.device.type != "cpu" for one in given):
        return False
    watched = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return not watched and not torch._C._are_functorch_transforms_active()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backend, ctx.geometry = backend, geometry
        together = x.contiguous(memory_format=torch.channels_last)
        result: Tensor = backend.convolution(together, weight, bias, *geometry)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        asked = ctx.needs_input_grad[1:4]
        *lengths, groups = ctx.geometry
        if torch.is_grad_enabled():  # of which there may be gradients again: the library's has them
            options = ([weight.shape[0]], *lengths, False, [0, 0], groups, list(asked))
            return (None, *torch.ops.aten.convolution_backward(grad, x, weight, *options), None)
        together = x.contiguous(memory_format=torch.channels_last)
        return (None, *ctx.backend.convolution_backward(grad, together, weight, *ctx.geometry, asked), None)


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return 2 * sizes if len(sizes) == 1 else sizes
