"""What `aot.py` compiles of the norm_act kernels: SmallConv's layers, made by the launchers from meta tensors."""

from collections.abc import Iterator

import torch

from unlocked.kernels.reference import PoolKind
from unlocked.kernels.triton.aot_spec import AotSpec
from unlocked.kernels.triton.norm_act import Launch, backward_launches, forward_launches

__all__ = ["AOT_SPECS", "CASES", "LAYOUTS", "launch_spec"]

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
# Shape, latent_size, pool: SmallConv at batch 64, its first layer at batch 2048, and windows that don't nest.
CASES: tuple[tuple[tuple[int, ...], int, PoolKind], ...] = (
    ((64, 32, 32, 32), 4, "max"),
    ((64, 64, 16, 16), 2, "max"),
    ((64, 128, 8, 8), 2, "average"),
    ((64, 512), 512, "none"),
    ((2048, 32, 32, 32), 4, "max"),
    ((64, 48, 12, 12), 4, "max"),
)
# Type, whether channels-last, and what the name of the specialisation says of it.
LAYOUTS = ((torch.float32, True, ""), (torch.bfloat16, True, "_bf16"), (torch.float16, False, "_fp16_contiguous"))


def _specs() -> Iterator[AotSpec]:
    for shape, latent_size, pool in CASES:
        for dtype, channels_last, suffix in LAYOUTS:
            conv = torch.empty(shape, dtype=dtype, device="meta")
            if conv.dim() == 4 and channels_last:
                conv = conv.to(memory_format=torch.channels_last)
            vector = torch.empty(shape[1], device="meta")
            result, launches = forward_launches(
                conv, vector, vector, vector, vector, vector, latent_size, pool, 2, 0.1, 1e-5, 0.01, None
            )
            side = latent_size if conv.dim() == 4 else 1
            sums = (result.mask_sums, result.mask_xhat_sums)
            launches += backward_launches(result.latents, conv, vector, vector, vector, vector, sums, side, 0.01)[1]
            launches += backward_launches(conv, conv, vector, vector, vector, vector, None, 0, 0.01)[1]
            name = "x".join(map(str, shape)) + suffix
            yield from (launch_spec(launch, "norm_act_", name) for launch in launches)


def launch_spec(launch: Launch, prefix: str, name: str) -> AotSpec:
    """Types and hints as Triton would find them in the arguments of the launch. The name: `prefix`, kernel, `name`."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    for argument, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
        if value is None or (isinstance(value, int) and value == 1):
            constants[argument] = value
        elif isinstance(value, torch.Tensor):
            signature[argument] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            width = "i32" if value < 2**31 else "i64"
            signature[argument] = width + (":16" if value % 16 == 0 else "")
    kind = launch.kernel.fn.__name__.removesuffix("_kernel")
    suffix = "_full" if constants.get("FULL") else ""
    return AotSpec(f"{prefix}{kind}{suffix}_{name}", launch.kernel, signature, constants, launch.num_warps)


AOT_SPECS = list(_specs())
