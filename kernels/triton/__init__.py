"""The Triton backend: the functions of `unlocked.kernels.reference` as fused kernels.

The names are imported when first asked for, so that this package can be imported, and asked why it is unavailable,
where the triton package is missing.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from unlocked.kernels.abilities import Abilities

if TYPE_CHECKING:
    from unlocked.kernels.triton.gelu import gelu_backward, gelu_forward
    from unlocked.kernels.triton.head import local_head
    from unlocked.kernels.triton.images import load_batch
    from unlocked.kernels.triton.max_pool import max_pool_backward, max_pool_forward
    from unlocked.kernels.triton.norm_act import norm_act_backward, norm_act_backward_full, norm_act_forward
    from unlocked.kernels.triton.sum_act import sum_act_backward, sum_act_forward
    from unlocked.kernels.triton.weight_grad import norm_act_weight_grad

__all__ = [
    "ABILITIES",
    "gelu_backward",
    "gelu_forward",
    "load_batch",
    "local_head",
    "max_pool_backward",
    "max_pool_forward",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "norm_act_weight_grad",
    "sum_act_backward",
    "sum_act_forward",
    "unavailable",
]

# One tile of the product holds so many in every type. On an H200 the joined weight gradient takes 22 us of SmallConv's
# first layer (27 elements) in tf32, the library's after our way back 50; with 288 elements and more the two are even.
_FEW_ELEMENTS = 32

ABILITIES = Abilities(
    devices=frozenset({"cuda"}),
    optimizers="triton",
    partial_gradients=True,
    weight_gradient=_FEW_ELEMENTS,
    gelu=True,
    sums=True,
    pools=True,
)

_HOMES = {
    "gelu_forward": "gelu",
    "gelu_backward": "gelu",
    "local_head": "head",
    "load_batch": "images",
    "max_pool_forward": "max_pool",
    "max_pool_backward": "max_pool",
    "norm_act_forward": "norm_act",
    "norm_act_backward": "norm_act",
    "norm_act_backward_full": "norm_act",
    "norm_act_weight_grad": "weight_grad",
    "sum_act_forward": "sum_act",
    "sum_act_backward": "sum_act",
}


def unavailable(device: torch.device | str) -> str:
    """Why the kernels can't run on `device`; "" if they can.

    They run on CUDA devices of compute capability 8.0 or newer, and anywhere under Triton's interpreter
    (TRITON_INTERPRET=1, set before triton is first imported), which is for tests.
    """
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "the triton package is missing; install unlocked[triton]"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type} (or TRITON_INTERPRET=1, for tests)"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"Triton kernels need compute capability 8.0 or newer, the device has {capability[0]}.{capability[1]}"
    return ""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
