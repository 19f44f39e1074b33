"""The table of operations: what each computes, what it keeps for the way back, and its gradients in closed form.

Shapes: B rows, C channels, H x W pixels of an operation's output. Activations and their gradients are float32 or
bfloat16; parameters are float32, and so are their gradients, but for those of a bfloat16 cast.
"""

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import KeyedDropout

__all__ = [
    "Add",
    "Casts",
    "Convolution",
    "Dropout",
    "Elementwise",
    "Flatten",
    "GroupNorm",
    "LayerNorm",
    "Operation",
    "Pool",
    "Replaceable",
    "convolution_backward",
    "geometry",
    "trained",
]

aten = torch.ops.aten


class Casts:
    """In which type a block computes, and how it turns rows of samples [B, C, L] round."""

    def __init__(self, device: str = "cpu", *, half: bool = False) -> None:
        self.half, self.device = half, device
        """Products and convolutions take bfloat16, as inside torch.autocast."""
        self.bfloat16_of: Callable[[Tensor], Tensor] | None = None
        """A weight in bfloat16, where the optimizer keeps copies: else it is cast in every `forward`."""
        self.transposed: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """A backend's own (`Abilities.transposes`); None: the library copies."""

    def value(self, x: Tensor) -> Tensor:
        """An input, in the type that is computed with."""
        return x.to(torch.bfloat16) if self.half and x.dtype == torch.float32 else x

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`."""
        if dtype == torch.bfloat16 and self.bfloat16_of is not None:
            return self.bfloat16_of(weight)
        return weight.to(dtype)

    def channels_together(self, x: Tensor) -> Tensor:
        """[B, C, L], copied unless its channels lie together."""
        if self.transposed is not None and x.is_contiguous() and not x.transpose(1, 2).is_contiguous():
            return self.transposed(x, None).transpose(1, 2)
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def left(self, result: Tensor, out: Tensor | None) -> Tensor:
        """What leaves a block, in `out` if given."""
        if self.transposed is not None and result.dim() == 3 and not result.is_contiguous():
            rows = result.transpose(1, 2)
            if rows.is_contiguous():
                return self.transposed(rows, out)
        return result if out is None else out.copy_(result)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, modules compute in that type. No casts are kept: a graph may be capturing."""
        if not self.half:
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)


Gradients = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]
"""Those of the inputs, where they were wanted, and those of the parameters."""


class Operation:
    """One operation of a body, or neighbours that run together. `backward` drops what `forward` has kept."""

    parameters: Sequence[nn.Parameter] = ()
    """Those that are trained, in the order of their gradients."""
    counts: Sequence[nn.Module] = ()
    """BatchNorms whose count of batches is left to the layer."""
    may_skip = False
    """A step may bring no gradient for some parameter."""

    def forward(self, *inputs: Any) -> Any:
        """The result, of the weights as they are now."""
        raise NotImplementedError

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the result's gradient, in its shape and type.

        Args:
            wanted: of which inputs a gradient is asked for.
        """
        raise NotImplementedError


def trained(*parameters: Tensor | None) -> list[nn.Parameter]:
    """Those of `parameters` that are there and train."""
    return [cast(nn.Parameter, p) for p in parameters if p is not None and p.requires_grad]


class Replaceable(Operation):
    """The library's, unless a backend has one of its own that a step is to take."""

    backend: ModuleType | None = None
    """What takes the library's place (`Abilities.convolutions`, `Abilities.attention`)."""


class Convolution(Replaceable):
    """The library's, in one or two dimensions, grouped or not.

    In one dimension it runs as one row of pixels whose channels lie together, as images' do, so that the kernels after
    it take its result; what it gives is a view [B, C, L].

    Args:
        bias_is_ahead: what follows adds the bias, or has no use for it: then its gradient is zero.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, casts: Casts, *, bias_is_ahead: bool = False) -> None:
        self.conv, self._casts = conv, casts
        self._kernel, self._bias = conv.weight, conv.bias  # a module looks its parameters up anew each time
        self.parameters = trained(conv.weight, conv.bias)
        self._has_bias = conv.bias is not None and not bias_is_ahead
        self._zero = torch.zeros_like(conv.bias) if bias_is_ahead and conv.bias is not None else None
        self._is_row = conv.weight.dim() == 3
        self._geometry: Geometry = (*geometry(conv), conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H_in, W_in] -> [B, C, H, W], or [B, C_in, L_in] -> [B, C, L]."""
        x = self._casts.value(x)
        weight = self._casts.weight(self._kernel, x.dtype)
        if self._is_row:
            x = self._casts.channels_together(x).unsqueeze(2)
            weight = weight.unsqueeze(2)
        self._x, self._weight = x, weight
        bias = self._casts.weight(self._bias, x.dtype) if self._has_bias and self._bias is not None else None
        convolve = F.conv2d if self.backend is None else self.backend.convolution
        result: Tensor = convolve(x, weight, bias, *self._geometry)
        return result.squeeze(2) if self._is_row else result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        grad = grad.unsqueeze(2) if self._is_row else grad
        x, kernel = self.spend()
        weight, bias = self._kernel, self._bias
        asked = [wanted[0], weight.requires_grad, self._has_bias and bias is not None and bias.requires_grad]
        x_grad, weight_grad, bias_grad = convolution_backward(grad, x, kernel, self._geometry, asked, self.backend)
        if self._is_row:
            x_grad = x_grad.squeeze(2) if wanted[0] else x_grad
            weight_grad = weight_grad.squeeze(2) if weight.requires_grad else weight_grad
        return [x_grad if wanted[0] else None], self.of_trained(weight_grad, bias_grad)

    def spend(self) -> tuple[Tensor, Tensor]:
        """The input and the kernel that `forward` has kept: nothing of a micro-batch outlives its update, or a stage
        would hold all inputs."""
        kept = self._x, self._weight
        del self._x, self._weight
        return kept

    def of_trained(self, weight_grad: Tensor, bias_grad: Tensor | None = None) -> list[Tensor]:
        """The gradients of `parameters`; that of a bias which is ahead is zero."""
        weight, bias = self._kernel, self._bias
        grads = [weight_grad] if weight.requires_grad else []
        if bias is not None and bias.requires_grad:
            grads.append(cast(Tensor, bias_grad if self._zero is None else self._zero))
        return grads


Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Stride, padding, dilation and groups of a convolution in two dimensions, as the library takes them."""


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, asked: list[bool], backend: ModuleType | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at `x`, of the kernel (like `weight`) and of the bias, as far as they are asked for, from `grad`
    [B, C, H, W]; by a backend's own or by the library."""
    result: tuple[Tensor, Tensor, Tensor]
    if backend is not None:
        result = backend.convolution_backward(grad, x, weight, *geometry, asked)
    else:
        sizes = [weight.shape[0]] if asked[2] else None
        *windows, groups = geometry
        result = aten.convolution_backward(grad, x, weight, sizes, *windows, False, [0, 0], groups, asked)
    return result


def geometry(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding, dilation; in one dimension, of one row of pixels."""
    stride, padding, dilation = (_two(size) for size in (conv.stride, conv.padding, conv.dilation))
    return stride, (0, padding[1]) if len(conv.padding) == 1 else padding, dilation


def _two(size: Any) -> tuple[int, int]:
    return (1, *size) if len(size) == 1 else size


class LayerNorm(Operation):
    """The library's."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.norm = norm
        self.parameters = trained(norm.weight, norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        self._x = x if x.device.type == "cpu" else x.float()  # elsewhere it takes no mixture of types
        shape = list(norm.normalized_shape)
        result, self._mean, self._rstd = aten.native_layer_norm(self._x, shape, norm.weight, norm.bias, norm.eps)
        return result.to(x.dtype)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        norm = self.norm
        asked = [wanted[0], *(p is not None and p.requires_grad for p in (norm.weight, norm.bias))]
        x, mean, rstd, weight, bias = self._x, self._mean, self._rstd, norm.weight, norm.bias
        del self._x, self._mean, self._rstd
        shape = list(norm.normalized_shape)
        grads = aten.native_layer_norm_backward(grad.to(x.dtype), x, shape, mean, rstd, weight, bias, asked)
        return [grads[0]], [g for g, is_asked in zip(grads[1:], asked[1:], strict=True) if is_asked]


class GroupNorm(Operation):
    """The library's."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.parameters = trained(norm.weight, norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...], any."""
        norm = self.norm
        self._x = x if x.device.type == "cpu" else x.float()
        self._x = _dense(self._x)
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), norm.num_groups)
        result, self._mean, self._rstd = aten.native_group_norm(self._x, norm.weight, norm.bias, *sizes, norm.eps)
        return result.to(x.dtype)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        norm, x, mean, rstd = self.norm, self._x, self._mean, self._rstd
        del self._x, self._mean, self._rstd
        # The input's is asked for in any case: without it torch 2.13 reads what is not there, of channels-last images.
        asked = [True, *(p is not None and p.requires_grad for p in (norm.weight, norm.bias))]
        grad = grad.to(x.dtype)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        else:
            grad = grad.contiguous()
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), norm.num_groups)
        grads = aten.native_group_norm_backward(grad, x, mean, rstd, norm.weight, *sizes, asked)
        return [grads[0]], [g for g, is_asked in zip(grads[1:], asked[1:], strict=True) if is_asked]


def _dense(x: Tensor) -> Tensor:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


class Elementwise(Operation):
    """An activation function.

    Args:
        function: of one tensor.
        derivative: (gradient, what is kept) -> gradient.
        keeps_result: what is kept is the result, else the input.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor, Tensor], Tensor],
        *,
        keeps_result: bool = False,
    ) -> None:
        self._function, self._derivative, self._keeps_result = function, derivative, keeps_result

    def forward(self, x: Tensor) -> Tensor:
        result = self._function(x)
        self._kept = result if self._keeps_result else x
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        kept = self._kept
        del self._kept
        return [self._derivative(grad, kept)], []


class Pool(Operation):
    """A pool of the library's.

    Args:
        function: input -> (result, what the derivative needs beside the input).
        derivative: (gradient, input, that) -> gradient.
    """

    def __init__(self, function: Callable[[Tensor], Any], derivative: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
        self._function, self._derivative = function, derivative

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor
        result, self._more = self._function(x)
        self._x = x
        return result

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        x, more = self._x, self._more
        del self._x, self._more
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            grad = grad.contiguous(memory_format=torch.channels_last)
        return [self._derivative(grad, x, more)], []


class Dropout(Operation):
    """Of a module whose mask depends on a key."""

    def __init__(self, dropout: KeyedDropout) -> None:
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        self._mask = self.dropout.mask(x)
        return x * self._mask

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        mask = self._mask
        del self._mask
        return [grad * mask], []


class Flatten(Operation):
    """The same values in another shape, or in another order of dimensions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        self._shape = x.shape
        return self._function(x)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return [grad.reshape(self._shape)], []


class Add(Operation):
    """A sum of two values, such as that of a residual connection."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._shapes = (a.shape, b.shape)
        return a + b

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        pairs = zip(self._shapes, wanted, strict=True)
        return [grad.sum_to_size(shape) if is_wanted else None for shape, is_wanted in pairs], []
