"""What `aot.py` compiles of the kernels for what stands inside a block and ends a residual one, from meta tensors."""

from collections.abc import Iterator

import torch

from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.norm_act_specs import launch_spec
from unlocked.kernels.triton.sum_act import sum_act_backward_launch, sum_act_forward_launch

__all__ = ["AOT_SPECS"]

_TYPES = ((torch.float32, ""), (torch.bfloat16, "_bf16"), (torch.float16, "_fp16"))
# Shape, latent_size: a ResNet18's first and last blocks at batch 128, of images of 32 x 32.
_SUMS = (((128, 64, 32, 32), 2), ((128, 512, 4, 4), 1))


def _specs() -> Iterator[AotSpec]:
    for dtype, suffix in _TYPES:
        for shape, side in _SUMS:
            image = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            (y, latents), forward = sum_act_forward_launch(image, image, side, 0.0)
            _, backward = sum_act_backward_launch(latents, y, side, 0.0)
            yield from (launch_spec(launch, "", "x".join(map(str, shape)) + suffix) for launch in (forward, backward))


AOT_SPECS = list(_specs())
