"""BatchNorm, the activation after it, and what the end of a block adds: latents and the next layer's input.

Shapes: B rows, C channels, H x W pixels of what is normalised, p the side of the latents' pooling, D latents
(D = C p p for images; a linear map's C features are its latents where p is C).
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import NormActResult, pool_latents, spread_latents
from unlocked.workers.graph.operations import Convolution, Gradients, Operation, trained

__all__ = ["ConvolvedEnd", "Normalized", "NormalizedEnd", "UnevenEnd"]


class Normalized(Operation):
    """BatchNorm and a leaky ReLU inside a block, on a backend's kernels.

    Args:
        norm: with affine parameters and running statistics, all [C].
        slope: of the leaky ReLU below zero; 0: a ReLU, 1: no activation.
        bias: that of the convolution or product before it, [C], which only the running mean needs.
        owns_input: nobody else reads what is normalised, so `backward` may overwrite it.
        of_product: the bias is a product's, which lies along the channels of [B, C] alone: that of more dimensions the
            product adds itself.
    """

    latent_size, pool, pool_size = 0, "none", 1

    def __init__(
        self,
        norm: nn.BatchNorm1d | nn.BatchNorm2d,
        slope: float,
        backend: ModuleType,
        *,
        bias: Tensor | None = None,
        owns_input: bool = False,
        of_product: bool = False,
    ) -> None:
        self.norm, self.slope, self.backend = norm, slope, backend
        self.owns_input = owns_input and backend.ABILITIES.in_place
        # A module looks its parameters and buffers up anew each time.
        self._vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, bias)
        self._of_product = of_product
        self.parameters = trained(norm.weight, norm.bias)
        self.counts = [norm]
        self.conv: Tensor | None = None
        self.result: NormActResult | None = None

    def forward(self, conv: Tensor, out: Tensor | None = None) -> Tensor:
        """The activations; with a pool what it makes of them; in `out` if given.

        Args:
            conv: [B, C, H, W], [B, C, L] or [B, C]; `backward` may overwrite it.
        """
        norm, vectors = self.norm, self._vectors
        if self._of_product and conv.dim() != 2:
            vectors = (*vectors[:4], None)
        is_row = conv.dim() == 3
        image = conv.unsqueeze(2) if is_row else conv
        if image.device.type == "cpu" and image.dim() == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        self.conv = image
        self.result = self.backend.norm_act_forward(
            image,
            *vectors,
            latent_size=self.latent_size,
            pool=self.pool,
            pool_size=self.pool_size,
            momentum=norm.momentum,
            eps=norm.eps,
            negative_slope=self.slope,
            out=out,
        )
        assert self.result is not None
        return self.result.output.squeeze(2) if is_row else self.result.output

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the gradient at every activation."""
        state, place = self._spend()
        conv = state[0]
        is_row = grad.dim() == 3
        grad = grad.unsqueeze(2) if is_row else grad
        if 0 in grad.stride() or (conv.device.type == "cpu" and grad.stride() != conv.stride()):
            grad = torch.empty_like(conv).copy_(grad)
        conv_grad, *grads = self.backend.norm_act_backward_full(grad, *state[:5], negative_slope=self.slope, **place)
        return [conv_grad.squeeze(2) if is_row else conv_grad], self._of_trained(grads)

    def _spend(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """What `forward` has kept, as the kernels of the way back take it, and where the gradient may be written."""
        conv, r = self.conv, self.result
        assert conv is not None
        assert r is not None
        self.conv = self.result = None
        state = (conv, r.mean, r.rstd, *self._vectors[:2], r.mask_sums, r.mask_xhat_sums)
        # Where nothing reads the convolution's output any more, a CPU's gradient takes its place.
        return state, {"out": conv} if self.owns_input and conv.device.type == "cpu" else {}

    def _of_trained(self, grads: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(self._vectors[:2], grads, strict=True)
        return [grad for parameter, grad in pairs if parameter.requires_grad]


class NormalizedEnd(Normalized):
    """The same at a block's end, where latents and the pooled output are made in the same pass.

    Args:
        latent_size: p, whose windows tile the plane; C of [B, C].
        pool: "none", "max" or "average", see `kernels.reference.norm_act_forward`.
    """

    def __init__(self, *args: Any, latent_size: int, pool: str, pool_size: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.latent_size, self.pool, self.pool_size = latent_size, pool, pool_size

    def latents(self) -> Tensor:
        """[B, C p p], or [B, C]."""
        assert self.result is not None
        return self.result.latents

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the latents' gradient, [B, C p p]: no gradient of full size exists."""
        state, place = self._spend()
        conv_grad, *grads = self.backend.norm_act_backward(
            grad,
            *state,
            latent_size=self.latent_size,
            negative_slope=self.slope,
            **place,
        )
        return [conv_grad], self._of_trained(grads)


class ConvolvedEnd(NormalizedEnd):
    """The same with the convolution before it, whose weight gradient the backend makes in the same pass back: so the
    gradient at the convolution's output does not exist either. Only where nobody asks for that of its input.

    Args:
        convolution: two-dimensional, of one group, its bias ahead, its weight trained.
    """

    def __init__(self, convolution: Convolution, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._convolution = convolution
        self.parameters = [*convolution.parameters, *self.parameters]

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """As `NormalizedEnd.forward`, from the convolution's input [B, C_in, H_in, W_in]."""
        return super().forward(self._convolution.forward(x), out)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the latents' gradient, [B, C p p], to those of the parameters alone."""
        assert not wanted[0]
        state, _ = self._spend()
        module = self._convolution.conv
        kernel_grad, *of_norm = self.backend.norm_act_weight_grad(
            grad,
            *state,
            *self._convolution.spend(),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            latent_size=self.latent_size,
            negative_slope=self.slope,
        )
        return [None], [*self._convolution.of_trained(kernel_grad), *self._of_trained(of_norm)]


class UnevenEnd(Normalized):
    """The same where pooling windows do not tile the plane (they overlap, or repeat values where there are few), and
    for the 2x2 average pool, which the kernels don't have.

    The kernels normalise and activate; the library pools, and spreads the latents' gradient over the activations, so
    that here a gradient exists at every activation.
    """

    def __init__(self, *args: Any, latent_size: int, pool: str, pool_size: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._side, self._kind, self._size = latent_size, pool, pool_size
        self._activations: Tensor | None = None

    def forward(self, conv: Tensor, out: Tensor | None = None) -> Tensor:
        """As `NormalizedEnd.forward`."""
        activations = self._activations = super().forward(conv)
        output = activations
        if self._kind == "max":
            output = F.max_pool2d(activations, 2)
        elif self._kind == "mean":
            output = F.avg_pool2d(activations, 2)
        elif self._kind == "average":
            output = F.adaptive_avg_pool2d(activations, self._size)
        return output if out is None else out.copy_(output)

    def latents(self) -> Tensor:
        """[B, C p p], or [B, p] of C features."""
        assert self._activations is not None
        return pool_latents(self._activations, self._side)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """From the latents' gradient, which is like `latents()`."""
        activations, self._activations = self._activations, None
        assert activations is not None
        return super().backward(spread_latents(grad, activations, self._side), wanted)
