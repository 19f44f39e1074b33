"""Triton's backend with BatchNorm's way back inside of every convolution's weight gradient: `kernels="triton_joined"`.

A name of its own, because the sums are other ones than the library's: no machine may change its mind about them in the
middle of a run, nor may two ranks differ. `triton`, which `auto` takes, joins them where few channels are read.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from unlocked.kernels import triton

if TYPE_CHECKING:
    from unlocked.kernels.triton import (
        gelu_backward,
        gelu_forward,
        load_batch,
        local_head,
        max_pool_backward,
        max_pool_forward,
        norm_act_backward,
        norm_act_backward_full,
        norm_act_forward,
        norm_act_weight_grad,
        sum_act_backward,
        sum_act_forward,
    )

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

ABILITIES = replace(triton.ABILITIES, weight_gradient=sys.maxsize)
unavailable = triton.unavailable


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(triton, name)
