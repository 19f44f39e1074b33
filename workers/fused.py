"""The local step in closed form, on the fused kernels: no autograd, no full-size activation gradient.

Which blocks and rules it covers is decided per layer (`choose_step`); all others keep the autograd step. The gradient
of a bias in front of BatchNorm is exactly zero here; autograd computes rounding noise for it.

With bfloat16 inputs (`unlocked.kernels.precision`) bfloat16 are: the cast weights, the library's results and their
gradients, the latents and their gradient, the output. The kernels compute in float32 and round what they store.
"""

import importlib
from types import ModuleType
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.dispatch import get_backend
from unlocked.kernels.reference import HeadResult, NormActResult, pool_latents
from unlocked.models import ConvBlock, DepthwiseBlock, KeyedDropout, LinearBlock, OutputBlock
from unlocked.rules import CrossEntropy
from unlocked.workers.layer import AutogradStep, Layer, Step, StepFactory

__all__ = ["FusedStep", "LogitsStep", "choose_step", "fused_step"]

_IN_PLACE = ("unlocked.kernels.cpp", "unlocked.kernels.reference")  # backends that write a gradient over its input


def choose_step(kernels: str, device: torch.device) -> StepFactory | None:
    """The step factory for `kernels` on `device`; None: autograd for every layer.

    Raises:
        ValueError: a backend asked for by name can't run on `device`.
    """
    backend = get_backend(kernels, device)
    if backend.__name__.endswith("reference"):
        return None
    return fused_step(backend)


def fused_step(backend: ModuleType) -> StepFactory:
    """Builds closed-form steps with the operations of `backend` where a layer allows it, autograd steps elsewhere."""

    def build(layer: Layer) -> Step:
        body = _body(layer)
        # A gradient for every parameter of the block is what the closed form gives: autograd knows of frozen ones.
        frozen = not all(p.requires_grad for p in layer.block.parameters())
        closed_form = body is not None and not frozen and layer.rule.head_arguments() is not None
        layer.optimizer = _fuse_optimizer(layer, backend, closed_form=closed_form)
        if body is not None and closed_form:
            return FusedStep(layer, backend, body)
        return LogitsStep(layer, backend) if _gives_logits(layer) else AutogradStep(layer)

    return build


class FusedStep:
    """One layer's local step in closed form.

    Args:
        backend: a module with the operations of `kernels.reference`.
        body: how the block's own arithmetic runs forward and back.
    """

    def __init__(self, layer: Layer, backend: ModuleType, body: "_Body") -> None:
        self.layer, self.backend, self.body = layer, backend, body
        self._dropout = next((m for m in layer.block.tail.modules() if isinstance(m, KeyedDropout) and m.p > 0), None)
        body.backend = backend

    @torch.no_grad()
    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self._dropout is None:
            return self.body.forward(x, out)
        result = cast(Tensor, self._dropout(self.body.forward(x, None)))
        return result if out is None else out.copy_(result)

    @torch.no_grad()
    def update(self, labels: Tensor) -> Tensor:
        layer = self.layer
        arguments = layer.rule.head_arguments()
        assert arguments is not None
        latents = self.body.latents()
        # Only the output layer's hits among the first five are of interest.
        totals = layer.totals if layer.is_output else layer.totals[:2]
        head: HeadResult = self.backend.local_head(latents, labels, **arguments._asdict(), totals=totals)
        grads = [*layer.rule.head_gradients(head), *self.body.backward(head.latents_grad)]
        self._apply([grad.float() for grad in grads])  # those of a bfloat16 cast are bfloat16
        return head.loss_sum

    def _apply(self, grads: list[Tensor]) -> None:
        optimizer = self.layer.optimizer
        if optimizer is None:
            return
        if not isinstance(optimizer, torch.optim.Optimizer):  # a fused one takes them as they are
            optimizer.step(grads)
            return
        for parameter, grad in zip(self.layer.parameters, grads, strict=True):
            parameter.grad = grad.contiguous(memory_format=_format_of(parameter))
        optimizer.step()


class LogitsStep(AutogradStep):
    """An output layer of any block, or a whole network that ends in one: autograd from the logits down.

    Loss, hits and the gradient at the logits come from the head's kernel, which spares backpropagation about twenty
    small ones.
    """

    def __init__(self, layer: Layer, backend: ModuleType) -> None:
        super().__init__(layer)
        self.backend = backend

    def update(self, labels: Tensor) -> Tensor:
        layer, logits = self.layer, self.take_activations()
        arguments = layer.rule.head_arguments()
        assert arguments is not None
        with torch.no_grad():
            head: HeadResult = self.backend.local_head(
                logits.detach(), labels, **arguments._asdict(), totals=layer.totals
            )
        if layer.optimizer is not None:
            layer.optimizer.zero_grad(set_to_none=True)
            logits.backward(head.latents_grad)
            layer.optimizer.step()
        return head.loss_sum


def _gives_logits(layer: Layer) -> bool:
    return layer.is_output and isinstance(layer.rule, CrossEntropy) and len(layer.info.activation_shape) == 1


class _Body(Protocol):
    """A block's own arithmetic. `backward` returns the gradients in the order of the block's parameters."""

    backend: ModuleType

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor: ...

    def latents(self) -> Tensor: ...

    def backward(self, latents_grad: Tensor) -> list[Tensor]: ...


class _Normalized:
    """BatchNorm + LeakyReLU + latents + pool of one block, and back; shared by the bodies below."""

    def __init__(self, block: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d, latent_size: int) -> None:
        self.block, self.norm, self.latent_size = block, norm, latent_size
        self.conv: Tensor | None = None
        self.result: NormActResult | None = None

    def forward(
        self, backend: ModuleType, conv: Tensor, bias: Tensor | None, out: Tensor | None, *, pool: bool = True
    ) -> Tensor:
        norm = self.norm
        self.conv = conv
        self.result = backend.norm_act_forward(
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
        assert self.result is not None
        return self.result.latents

    def backward(self, backend: ModuleType, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at the convolution's output, BatchNorm's weight and bias gradients)."""
        r, norm = self.result, self.norm
        assert r is not None
        assert self.conv is not None
        conv, self.conv, self.result = self.conv, None, None
        slope = self.block.negative_slope
        # Nothing reads the convolution's output any more, so a CPU's gradient takes its place.
        place = {"out": conv} if conv.device.type == "cpu" and backend.__name__ in _IN_PLACE else {}
        if self.latent_size == 0:
            full: tuple[Tensor, Tensor, Tensor] = backend.norm_act_backward_full(
                grad, conv, r.mean, r.rstd, norm.weight, norm.bias, negative_slope=slope, **place
            )
            return full
        pooled: tuple[Tensor, Tensor, Tensor] = backend.norm_act_backward(
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


class _UnevenlyPooled(_Normalized):
    """The same where pooling windows do not tile the plane: they overlap, or repeat values where there are few.

    The kernels normalise and activate; the library pools, and spreads the latents' gradient over the activations, so
    that here a gradient exists at every activation.
    """

    def __init__(self, block: Any, norm: nn.BatchNorm1d | nn.BatchNorm2d, latent_size: int) -> None:
        super().__init__(block, norm, 0)
        self._side = latent_size
        self._activations: Tensor | None = None

    def forward(
        self, backend: ModuleType, conv: Tensor, bias: Tensor | None, out: Tensor | None, *, pool: bool = True
    ) -> Tensor:
        activations = self._activations = super().forward(backend, conv, bias, None, pool=False)
        output = activations
        if self.block.pool == "max":
            output = F.max_pool2d(activations, 2)
        elif self.block.pool == "average":
            output = F.adaptive_avg_pool2d(activations, self.block.pool_size)
        return output if out is None else out.copy_(output)

    def latents(self) -> Tensor:
        assert self._activations is not None
        return pool_latents(self._activations, self._side)

    def backward(self, backend: ModuleType, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        activations, self._activations = self._activations, None
        assert activations is not None
        if activations.dim() == 4:
            grid = grad.view(*activations.shape[:2], self._side, self._side)
            full = torch.ops.aten._adaptive_avg_pool2d_backward(grid, activations)
            full = full.contiguous(memory_format=torch.channels_last)
        else:  # torch pools in one dimension as in two, the other being 1
            row = activations[:, None, None]
            full = torch.ops.aten._adaptive_avg_pool2d_backward(grad[:, None, None], row)[:, 0, 0]
        return super().backward(backend, full)


class _ConvBody:
    """Convolution (library) -> normalise, activate, pool. The convolution runs without its bias; see the reference."""

    backend: ModuleType

    def __init__(self, block: ConvBlock, rest: _Normalized) -> None:
        self.conv, self.rest = block.conv, rest
        self._zero = None if self.conv.bias is None else torch.zeros_like(self.conv.bias)

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._x, self._weight = x, self.conv.weight.to(x.dtype)
        return self.rest.forward(self.backend, _convolve(self.conv, x, self._weight), self.conv.bias, out)

    def latents(self) -> Tensor:
        return self.rest.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        grad, weight_grad, bias_grad = self.rest.backward(self.backend, latents_grad)
        kernel_grad = _convolution_backward(self.conv, grad, self._x, self._weight)[1]
        del self._x  # nothing of a micro-batch outlives its update, or a stage would hold all its layers' inputs
        return [kernel_grad, *([] if self._zero is None else [self._zero]), weight_grad, bias_grad]


class _DepthwiseBody:
    """Depthwise convolution, normalise, pointwise convolution, normalise: the one block with a gradient inside."""

    backend: ModuleType

    def __init__(self, block: DepthwiseBlock, rest: _Normalized) -> None:
        self.depthwise, self.pointwise = block.depthwise, block.pointwise
        self.first, self.second = _Normalized(block, block.norm1, 0), rest

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._x = x
        self._weights = tuple(conv.weight.to(x.dtype) for conv in (self.depthwise, self.pointwise))
        conv = _convolve(self.depthwise, x, self._weights[0])
        self._inner = self.first.forward(self.backend, conv, None, None, pool=False)
        return self.second.forward(self.backend, _convolve(self.pointwise, self._inner, self._weights[1]), None, out)

    def latents(self) -> Tensor:
        return self.second.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        grad, weight2, bias2 = self.second.backward(self.backend, latents_grad)
        first, second = self._weights
        inner_grad, pointwise = _convolution_backward(self.pointwise, grad, self._inner, second, with_input=True)[:2]
        grad, weight1, bias1 = self.first.backward(self.backend, inner_grad)
        depthwise = _convolution_backward(self.depthwise, grad, self._x, first)[1]
        del self._x, self._inner
        return [depthwise, weight1, bias1, pointwise, weight2, bias2]


class _LinearBody:
    """Linear map (library, without its bias) -> normalise, activate."""

    backend: ModuleType

    def __init__(self, block: LinearBlock, rest: _Normalized) -> None:
        self.linear, self.rest = block.linear, rest
        self._zero = torch.zeros_like(self.linear.bias)

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._x = x.flatten(1)
        product = F.linear(self._x, self.linear.weight.to(x.dtype))
        return self.rest.forward(self.backend, product, self.linear.bias, out)

    def latents(self) -> Tensor:
        return self.rest.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        grad, weight_grad, bias_grad = self.rest.backward(self.backend, latents_grad)
        kernel_grad = grad.T @ self._x
        del self._x
        return [kernel_grad, self._zero, weight_grad, bias_grad]


class _OutputBody:
    """The output layer: its logits are their own latents. Its input is float32, whatever the precision."""

    backend: ModuleType

    def __init__(self, block: OutputBlock) -> None:
        self.linear = block.linear

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._x = x.flatten(1)
        self._logits = F.linear(self._x, self.linear.weight, self.linear.bias)
        return self._logits if out is None else out.copy_(self._logits)

    def latents(self) -> Tensor:
        return self._logits

    def backward(self, latents_grad: Tensor) -> list[Tensor]:
        kernel_grad = latents_grad.T @ self._x
        del self._x, self._logits
        return [kernel_grad, latents_grad.sum(0)]


def _body(layer: Layer) -> _Body | None:
    """The closed form of the layer's block, or None where there is none."""
    block, info = layer.block, layer.info
    p, shape = info.latent_size, info.activation_shape
    if isinstance(block, OutputBlock):
        return _OutputBody(block)
    if isinstance(block, LinearBlock) and _usable(block.norm):
        return _LinearBody(block, (_Normalized if p == shape[0] else _UnevenlyPooled)(block, block.norm, p))
    if isinstance(block, ConvBlock | DepthwiseBlock):
        sides = [p, block.pool_size] if block.pool == "average" else [p]
        even = all(length % side == 0 for length in shape[1:] for side in sides)
        pooled = _Normalized if even else _UnevenlyPooled
        if isinstance(block, ConvBlock):
            return _ConvBody(block, pooled(block, block.norm, p)) if _usable(block.norm) else None
        norms = _usable(block.norm1) and _usable(block.norm2)
        return _DepthwiseBody(block, pooled(block, block.norm2, p)) if norms else None
    return None


def _usable(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return norm.affine and norm.track_running_stats and norm.momentum is not None


def _fuse_optimizer(layer: Layer, backend: ModuleType, *, closed_form: bool) -> Any:
    """One kernel for all of the layer's parameters, where the backend has one for its optimizer; else it as it is.

    On a CPU Triton only runs in its interpreter, which is for tests of Triton: other backends leave it alone there.
    The C++ kernels want a gradient for every parameter, which only the closed form promises.
    """
    optimizer = layer.optimizer
    if optimizer is None:
        return None
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    if closed_form and list(map(id, owned)) != list(map(id, layer.parameters)):
        return optimizer  # of some of them, or in another order: gradients are given by place
    if backend.__name__ == "unlocked.kernels.cpp":
        native = importlib.import_module("unlocked.kernels.cpp.optim").from_torch(optimizer) if closed_form else None
        return native or optimizer
    triton = importlib.import_module("unlocked.kernels.triton")
    interpreted = layer.device.type == "cpu" and backend is not triton
    if interpreted or triton.unavailable(layer.device):
        return optimizer
    return importlib.import_module("unlocked.kernels.triton.optim").from_torch(optimizer) or optimizer


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _convolution_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, *, with_input: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
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


def _format_of(parameter: Tensor) -> torch.memory_format:
    channels_last = parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
