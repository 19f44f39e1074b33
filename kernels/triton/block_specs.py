"""What `aot.py` compiles of the kernels for what stands inside a block and ends a residual one, from meta tensors."""

from collections.abc import Iterator

import torch

from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.gelu import gelu_backward_launches, gelu_forward_launch
from unlocked.kernels.triton.max_pool import max_pool_backward_launch, max_pool_forward_launch
from unlocked.kernels.triton.norm_act_specs import launch_spec
from unlocked.kernels.triton.sum_act import sum_act_backward_launch, sum_act_forward_launch

__all__ = ["AOT_SPECS"]

_TYPES = ((torch.float32, ""), (torch.bfloat16, "_bf16"), (torch.float16, "_fp16"))
# Shape, latent_size: a ResNet18's first and last blocks at batch 128, of images of 32 x 32.
_SUMS = (((128, 64, 32, 32), 2), ((128, 512, 4, 4), 1))

_TOKENS = (128, 65, 512)  # of an encoder layer's wide product

_POOLED = ((128, 64, 32, 32), (128, 48, 7, 7))  # of a small network's convolution, and of odd sides


def _specs() -> Iterator[AotSpec]:
    for dtype, suffix in _TYPES:
        for shape, side in _SUMS:
            image = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            (y, latents), forward = sum_act_forward_launch(image, image, side, 0.0)
            _, backward = sum_act_backward_launch(latents, y, side, 0.0)
            yield from (launch_spec(launch, "", "x".join(map(str, shape)) + suffix) for launch in (forward, backward))
        for shape in _POOLED:
            image = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
            (y, places), forward = max_pool_forward_launch(image)
            _, backward = max_pool_backward_launch(y, places, *shape[2:])
            yield from (launch_spec(launch, "", "x".join(map(str, shape)) + suffix) for launch in (forward, backward))
        x = torch.empty(_TOKENS, dtype=dtype, device="meta")
        (_, slope), first = gelu_forward_launch(x)
        for repeats in (1, _TOKENS[1]):
            launches = gelu_backward_launches(x, slope, repeats)[1]
            name = "x".join(map(str, _TOKENS)) + suffix
            if repeats == 1:
                yield from (launch_spec(launch, "", name) for launch in (first, *launches))
            else:
                yield launch_spec(launches[0], "", name + "_shared")


AOT_SPECS = list(_specs())
