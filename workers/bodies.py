"""A block's own arithmetic in closed form, forward and back: what `workers.fused` puts the local head between.

Shapes: B rows, C channels, H x W pixels of the convolution's output, p the side of the latents' pooling, D latents
(D = C p p for images; a linear block's C features are its latents where p is C). Activations and their gradients are
float32 or bfloat16, as the input; parameters and their gradients are float32, but for those of a bfloat16 cast.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import NormActResult, pool_latents
from unlocked.models import Block, ConvBlock, DepthwiseBlock, LinearBlock, OutputBlock
from unlocked.rules import LayerInfo

__all__ = [
    "Body",
    "ConvBody",
    "DepthwiseBody",
    "LinearBody",
    "Normalized",
    "OutputBody",
    "UnevenlyPooled",
    "convolution_backward",
    "convolve",
    "make_body",
]


class Body(Protocol):
    """One block's arithmetic: a `forward`, then one `latents` and one `backward`, which drops what was kept."""

    bfloat16_of: Callable[[Tensor], Tensor] | None
    """The optimizer's bfloat16 copy of a weight, where it keeps one: else the weight is cast in every `forward`."""

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The next layer's input: [B, C, H', W'] (H' x W' after the block's pooling), or [B, C]; in `out` if given.

        Args:
            x: the block's input: [B, C_in, H_in, W_in], or for linear blocks anything that flattens to [B, D_in].
            out: where to write the result: its shape and dtype, any strides.
        """
        ...

    def latents(self) -> Tensor:
        """What the local head sees of the last `forward`: [B, D]."""
        ...

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        """The gradients of the block's parameters, in their order and shapes, from that of the latents [B, D]."""
        ...


def make_body(block: Block, info: LayerInfo, backend: ModuleType) -> Body | None:
    """The closed form of `block` on the operations of `backend`, or None where there is none."""
    p, shape = info.latent_size, info.activation_shape
    if isinstance(block, OutputBlock):
        return OutputBody(block)
    if isinstance(block, LinearBlock) and _usable(block.norm):
        pooled = Normalized if p == shape[0] else UnevenlyPooled
        return LinearBody(block, pooled(block, block.norm, p, backend))
    if isinstance(block, ConvBlock | DepthwiseBlock):
        sides = [p, block.pool_size] if block.pool == "average" else [p]
        even = block.pool != "mean" and all(length % side == 0 for length in shape[1:] for side in sides)
        pooled = Normalized if even else UnevenlyPooled
        if isinstance(block, ConvBlock):
            return ConvBody(block, pooled(block, block.norm, p, backend)) if _usable(block.norm) else None
        if _usable(block.norm1) and _usable(block.norm2):
            first = Normalized(block, block.norm1, 0, backend)
            return DepthwiseBody(block, first, pooled(block, block.norm2, p, backend))
    return None


class Normalized:
    """BatchNorm + LeakyReLU + latents + pool of one block, and back; shared by the bodies below.

    Args:
        block: says how to pool, and the LeakyReLU's slope.
        norm: with affine parameters and running statistics, all [C].
        latent_size: p; 0: no latents, and `backward` takes a gradient at every activation.
    """

    def __init__(
        self, block: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d, latent_size: int, backend: ModuleType
    ) -> None:
        self.block, self.norm, self.latent_size, self.backend = block, norm, latent_size, backend
        self.conv: Tensor | None = None
        self.result: NormActResult | None = None

    def forward(self, conv: Tensor, bias: Tensor | None, out: Tensor | None, *, pool: bool = True) -> Tensor:
        """The next layer's input [B, C, H', W'] or [B, C], in `out` if given.

        Args:
            conv: the convolution's output without its bias, [B, C, H, W] or [B, C]; `backward` may overwrite it.
            bias: the convolution's, [C], which only the running mean needs.
            pool: False: the activations, like `conv`, instead of the block's pooling of them.
        """
        norm = self.norm
        self.conv = conv
        self.result = self.backend.norm_act_forward(
            conv,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            bias,
            latent_size=self.latent_size,
            pool=self.block.pool if pool else "none",
            pool_size=self.block.pool_size if pool else 1,
            momentum=norm.momentum,
            eps=norm.eps,
            negative_slope=self.block.negative_slope,
            out=out,
        )
        assert self.result is not None
        return self.result.output

    def latents(self) -> Tensor:
        """[B, C p p], or [B, C] of a linear block."""
        assert self.result is not None
        return self.result.latents

    @property
    def joins_weight_gradient(self) -> bool:
        """Whether the backend has `backward` and a convolution's weight gradient in one: see `backward_to_kernel`."""
        return bool(self.latent_size) and bool(self.backend.ABILITIES.weight_gradient)

    def backward_to_kernel(
        self, grad: Tensor, module: nn.Conv2d, x: Tensor, kernel: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient of the convolution's kernel, like it; BatchNorm's weight and bias gradients, [C] each).

        Args:
            grad: the latents', [B, C p p].
            module: the convolution before it, of one group; x: its input; kernel: its weight, in the type of `x`.
        """
        r, norm = self.result, self.norm
        assert r is not None
        assert self.conv is not None
        conv, self.conv, self.result = self.conv, None, None
        state = (grad, conv, r.mean, r.rstd, norm.weight, norm.bias, r.mask_sums, r.mask_xhat_sums, x, kernel)
        result: tuple[Tensor, Tensor, Tensor] = self.backend.norm_act_weight_grad(
            *state,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            latent_size=self.latent_size,
            negative_slope=self.block.negative_slope,
        )
        return result

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at the convolution's output, like it; BatchNorm's weight and bias gradients, [C] each).

        Args:
            grad: the latents', [B, C p p]; without latents that of every activation, like the convolution's output.
        """
        r, norm = self.result, self.norm
        assert r is not None
        assert self.conv is not None
        conv, self.conv, self.result = self.conv, None, None
        slope = self.block.negative_slope
        # Nothing reads the convolution's output any more, so a CPU's gradient takes its place.
        place = {"out": conv} if conv.device.type == "cpu" and self.backend.ABILITIES.in_place else {}
        if self.latent_size == 0:
            full: tuple[Tensor, Tensor, Tensor] = self.backend.norm_act_backward_full(
                grad, conv, r.mean, r.rstd, norm.weight, norm.bias, negative_slope=slope, **place
            )
            return full
        pooled: tuple[Tensor, Tensor, Tensor] = self.backend.norm_act_backward(
            grad,
            conv,
            r.mean,
            r.rstd,
            norm.weight,
            norm.bias,
            r.mask_sums,
            r.mask_xhat_sums,
            latent_size=self.latent_size,
            negative_slope=slope,
            **place,
        )
        return pooled


class UnevenlyPooled(Normalized):
    """The same where pooling windows do not tile the plane (they overlap, or repeat values where there are few), and
    for the 2x2 average pool, which the kernels don't have.

    The kernels normalise and activate; the library pools, and spreads the latents' gradient over the activations, so
    that here a gradient exists at every activation.
    """

    def __init__(
        self, block: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d, latent_size: int, backend: ModuleType
    ) -> None:
        super().__init__(block, norm, 0, backend)
        self._side = latent_size
        self._activations: Tensor | None = None

    def forward(self, conv: Tensor, bias: Tensor | None, out: Tensor | None, *, pool: bool = True) -> Tensor:
        """As `Normalized.forward`; `pool` is the block's here."""
        activations = self._activations = super().forward(conv, bias, None, pool=False)
        output = activations
        if self.block.pool == "max":
            output = F.max_pool2d(activations, 2)
        elif self.block.pool == "mean":
            output = F.avg_pool2d(activations, 2)
        elif self.block.pool == "average":
            output = F.adaptive_avg_pool2d(activations, self.block.pool_size)
        return output if out is None else out.copy_(output)

    def latents(self) -> Tensor:
        """[B, C p p], or [B, p] of a linear block's C features."""
        assert self._activations is not None
        return pool_latents(self._activations, self._side)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Normalized.backward`, from the latents' gradient, which is like `latents()`."""
        activations, self._activations = self._activations, None
        assert activations is not None
        if activations.dim() == 4:
            grid = grad.view(*activations.shape[:2], self._side, self._side)
            full = torch.ops.aten._adaptive_avg_pool2d_backward(grid, activations)
            full = full.contiguous(memory_format=torch.channels_last)
        else:  # torch pools in one dimension as in two, the other being 1
            row = activations[:, None, None]
            full = torch.ops.aten._adaptive_avg_pool2d_backward(grad[:, None, None], row)[:, 0, 0]
        return super().backward(full)


class _Casting:
    """Of bodies whose weights are computed with in the input's type."""

    bfloat16_of: Callable[[Tensor], Tensor] | None = None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`."""
        if dtype == torch.bfloat16 and self.bfloat16_of is not None:
            return self.bfloat16_of(weight)
        return weight.to(dtype)


class ConvBody(_Casting):
    """Convolution (library) -> normalise, activate, pool. The convolution runs without its bias; see the reference."""

    def __init__(self, block: ConvBlock, rest: Normalized) -> None:
        self.conv, self.rest = block.conv, rest
        self._zero = None if self.conv.bias is None else torch.zeros_like(self.conv.bias)

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """[B, C_in, H_in, W_in] -> [B, C, H', W']."""
        self._x, self._weight = x, self.cast(self.conv.weight, x.dtype)
        return self.rest.forward(convolve(self.conv, x, self._weight), self.conv.bias, out)

    def latents(self) -> Tensor:
        """[B, C p p]."""
        return self.rest.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        """[kernel, its bias (zeros, where it has one), BatchNorm's weight and bias] from [B, C p p]."""
        if self.rest.joins_weight_gradient and self.conv.groups == 1:
            grads = self.rest.backward_to_kernel(latents_grad, self.conv, self._x, self._weight)
            kernel_grad, weight_grad, bias_grad = grads
        else:
            grad, weight_grad, bias_grad = self.rest.backward(latents_grad)
            kernel_grad = convolution_backward(self.conv, grad, self._x, self._weight)[1]
        del self._x  # nothing of a micro-batch outlives its update, or a stage would hold all its layers' inputs
        return [kernel_grad, *([] if self._zero is None else [self._zero]), weight_grad, bias_grad]


class DepthwiseBody(_Casting):
    """Depthwise convolution, normalise, pointwise convolution, normalise: the one block with a gradient inside.

    Args:
        first: between the convolutions, C_in channels, without latents.
        second: after the pointwise convolution, C channels.
    """

    def __init__(self, block: DepthwiseBlock, first: Normalized, second: Normalized) -> None:
        self.depthwise, self.pointwise = block.depthwise, block.pointwise
        self.first, self.second = first, second

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """[B, C_in, H_in, W_in] -> [B, C, H', W']."""
        self._x = x
        self._weights = tuple(self.cast(conv.weight, x.dtype) for conv in (self.depthwise, self.pointwise))
        conv = convolve(self.depthwise, x, self._weights[0])
        self._inner = self.first.forward(conv, None, None, pool=False)
        return self.second.forward(convolve(self.pointwise, self._inner, self._weights[1]), None, out)

    def latents(self) -> Tensor:
        """[B, C p p]."""
        return self.second.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        """[depthwise kernel, norm1's weight and bias, pointwise kernel, norm2's weight and bias] from [B, C p p]."""
        grad, weight2, bias2 = self.second.backward(latents_grad)
        first, second = self._weights
        inner_grad, pointwise = convolution_backward(self.pointwise, grad, self._inner, second, with_input=True)[:2]
        grad, weight1, bias1 = self.first.backward(inner_grad)
        depthwise = convolution_backward(self.depthwise, grad, self._x, first)[1]
        del self._x, self._inner
        return [depthwise, weight1, bias1, pointwise, weight2, bias2]


class LinearBody(_Casting):
    """Linear map (library, without its bias) -> normalise, activate."""

    def __init__(self, block: LinearBlock, rest: Normalized) -> None:
        self.linear, self.rest = block.linear, rest
        self._zero = torch.zeros_like(self.linear.bias)

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """[B, D_in], or what flattens to it, -> [B, C]."""
        self._x = x.flatten(1)
        product = F.linear(self._x, self.cast(self.linear.weight, x.dtype))
        return self.rest.forward(product, self.linear.bias, out)

    def latents(self) -> Tensor:
        """[B, C], or [B, p] where p is not C."""
        return self.rest.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        """[weight [C, D_in], its bias (zeros), BatchNorm's weight and bias] from the gradient at `latents()`."""
        grad, weight_grad, bias_grad = self.rest.backward(latents_grad)
        kernel_grad = grad.T @ self._x
        del self._x
        return [kernel_grad, self._zero, weight_grad, bias_grad]


class OutputBody(_Casting):
    """The output layer: its logits are their own latents. Its input is float32, whatever the precision."""

    def __init__(self, block: OutputBlock) -> None:
        self.linear = block.linear

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """[B, D_in], or what flattens to it, -> the logits [B, N] of N classes."""
        self._x = x.flatten(1)
        self._logits = F.linear(self._x, self.linear.weight, self.linear.bias)
        return self._logits if out is None else out.copy_(self._logits)

    def latents(self) -> Tensor:
        """The logits, [B, N]."""
        return self._logits

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        """[weight [N, D_in], bias [N]] from the logits' gradient [B, N]."""
        kernel_grad = latents_grad.T @ self._x
        del self._x, self._logits
        return [kernel_grad, latents_grad.sum(0)]


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """`conv` without its bias, with a kernel `weight` like its own: [B, C_in, H_in, W_in] -> [B, C, H, W]."""
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolution_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, *, with_input: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient at `x`, only `with_input`; gradient of the kernel, like `weight`; nothing) from `grad` [B, C, H, W]."""
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        [with_input, True, False],
    )
    return result


def _usable(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None
