"""What `aot.py` compiles of the weight gradient's kernels: SmallConv's convolutions, from meta tensors."""

from collections.abc import Iterator

import torch

from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.norm_act import shape_of
from unlocked.kernels.triton.norm_act_specs import LAYOUTS, launch_spec
from unlocked.kernels.triton.weight_grad import weight_grad_launches
from unlocked.kernels.triton.weight_grad_geometry import Convolution, weight_grad_geometry

__all__ = ["AOT_SPECS"]

# Batch, input channels, output channels, side, latent_size: SmallConv, its first layer with a fourth channel.
_CASES = ((64, 3, 32, 32, 4), (64, 4, 32, 32, 4), (64, 32, 64, 16, 2), (64, 64, 128, 8, 2))


def _specs() -> Iterator[AotSpec]:
    for batch, inputs, outputs, side, latent_size in _CASES:
        convolution = Convolution((inputs, side, side), (3, 3), (1, 1), (1, 1), (1, 1))
        for dtype, channels_last, suffix in LAYOUTS:
            memory_format = torch.channels_last if channels_last else torch.contiguous_format
            sizes = ((batch, inputs, side, side), (batch, outputs, side, side), (outputs, inputs, 3, 3))
            source, conv, kernel = (
                torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format) for size in sizes
            )
            vector = torch.empty(outputs, device="meta")
            grad = torch.empty((batch, outputs * latent_size**2), dtype=dtype, device="meta")
            sums = grad.float()
            for tf32 in (True, False) if dtype == torch.float32 else (False,):
                geometry = weight_grad_geometry(shape_of(conv), latent_size, convolution, tf32=tf32)
                _, (_, *launches) = weight_grad_launches(
                    grad, conv, vector, vector, vector, vector, sums, sums, source, kernel, geometry, 0.01, tf32=tf32
                )
                name = f"{batch}x{inputs}x{side}x{side}" + ("_tf32" if tf32 else suffix)
                yield launch_spec(launches[0], "", name)
                if not tf32:
                    yield launch_spec(launches[1], "", name)


AOT_SPECS = list(_specs())
