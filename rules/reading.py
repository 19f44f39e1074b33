"""What rules read of a layer's activations, with a way back that is cheaper than autograd's own on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import Layout, pool_latents, spread_latents

__all__ = ["ConvOfEnlarged", "read_latents"]


def read_latents(activations: Tensor, latent_size: int, layout: Layout | None = None) -> Tensor:
    """`pool_latents`, bit by bit. On a CPU the gradient of maps [B, C, H, W] keeps their layout: autograd's own way
    back copies maps whose channels lie together twice, a quarter of Distance-Forward's step."""
    ordinary = activations.dim() == 4 and activations.device.type == "cpu" and activations.requires_grad
    if not ordinary or torch._C._are_functorch_transforms_active():
        return pool_latents(activations, latent_size, layout)
    pooled: Tensor = _Pooled.apply(activations, latent_size)
    return pooled.flatten(1)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activations: Tensor, latent_size: int) -> Tensor:
        ctx.save_for_backward(activations)
        ctx.latent_size = latent_size
        return F.adaptive_avg_pool2d(activations, latent_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (activations,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # of which there may be gradients again: the library's has them
            return torch.ops.aten._adaptive_avg_pool2d_backward(grad, activations), None
        return spread_latents(grad.contiguous(), activations, ctx.latent_size), None


class ConvOfEnlarged(nn.Conv2d):
    """A 3 x 3 convolution (padding 1) of maps [B, C, h, w] enlarged bilinearly, corners aligned, to `size` (H, W): the
    result [B, K, H, W] of `nn.Upsample` and `nn.Conv2d`, without the enlarged maps.

    Both are linear, and enlarging acts on places alone. So each tap of the kernel mixes the channels where maps are
    small, and what it gave is enlarged and shifted by products with matrices [3 h, H] and [3 w, W]: for 128 channels
    of 8 x 8 pixels, 12 outputs and 32 x 32 places a tenth of the multiplications.

    Args:
        channels, outputs: C and K.
        size: H >= h and W >= w.
    """

    def __init__(self, channels: int, outputs: int, sides: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__(channels, outputs, 3, padding=1)
        self._matrices = [_enlarging(*lengths) for lengths in zip(sides, size, strict=True)]

    def forward(self, input: Tensor) -> Tensor:
        if self._matrices[0].dtype != input.dtype or self._matrices[0].device != input.device:
            pairs = zip(input.shape[2:], self._matrices, strict=True)
            self._matrices = [_enlarging(few, matrix.shape[1]).to(input) for few, matrix in pairs]
        rows, columns = self._matrices
        batch, _, height, width = input.shape
        taps = self.weight.permute(0, 2, 3, 1).reshape(-1, self.in_channels, 1, 1)  # [9 K, C, 1, 1]
        mixed = F.conv2d(input, taps).view(batch, self.out_channels, 3, 3, height, width)
        mixed = mixed.permute(0, 1, 2, 4, 3, 5).reshape(-1, 3 * width)
        wide = (mixed @ columns).view(batch, self.out_channels, 3 * height, -1)
        high = wide.transpose(2, 3).reshape(-1, 3 * height) @ rows  # [B K W, H]
        maps = high.view(batch, self.out_channels, -1, high.shape[1]).transpose(2, 3)
        return maps if self.bias is None else maps + self.bias[:, None, None]


def _enlarging(few: int, many: int) -> Tensor:
    """[3 few, many], float64: for each tap of a kernel what place i of `few` gives to place o of `many`, with zeros
    beyond the rim. The weights are the library's own: it enlarges a unit at each place."""
    units = torch.eye(few, dtype=torch.float64)[:, None, :, None]
    whole = F.interpolate(units, (many, 1), mode="bilinear", align_corners=True)[:, 0, :, 0]
    padded = F.pad(whole, (1, 1))
    return torch.cat([padded[:, tap : tap + many] for tap in range(3)])
