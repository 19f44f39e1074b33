"""The CPU backend in C++: the functions of `unlocked.kernels.reference` in as few passes as the statistics allow.

It covers float32 and bfloat16 in channels-last memory (and [B, C]); whatever else it is given goes to the reference.
Results do not depend on the number of threads. Compiled on first use with the system's C++ compiler.
"""

from unlocked.kernels.abilities import Abilities
from unlocked.kernels.cpp.attention import attention_backward, attention_forward, takes_attention
from unlocked.kernels.cpp.bindings import unavailable
from unlocked.kernels.cpp.gelu import gelu_backward, gelu_forward, silu_forward
from unlocked.kernels.cpp.group_act import group_act_backward, group_act_forward
from unlocked.kernels.cpp.head import local_head
from unlocked.kernels.cpp.max_pool import max_pool_backward, max_pool_forward
from unlocked.kernels.cpp.norm_act import norm_act_backward, norm_act_backward_full, norm_act_forward
from unlocked.kernels.cpp.sum_act import sum_act_backward, sum_act_forward
from unlocked.kernels.cpp.transpose import transposed
from unlocked.kernels.cpp.vocabulary import score_gradients
from unlocked.kernels.images import load_batch

__all__ = [
    "ABILITIES",
    "attention_backward",
    "attention_forward",
    "gelu_backward",
    "gelu_forward",
    "group_act_backward",
    "group_act_forward",
    "load_batch",
    "local_head",
    "max_pool_backward",
    "max_pool_forward",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "score_gradients",
    "silu_forward",
    "sum_act_backward",
    "sum_act_forward",
    "takes_attention",
    "transposed",
    "unavailable",
]

ABILITIES = Abilities(
    devices=frozenset({"cpu"}),
    in_place=True,
    optimizers="cpp",
    gelu=True,
    silu=True,
    groups=True,
    vocabulary=True,
    attention=True,
    sums=True,
    lone_ends=True,
    pools=True,
    transposes=True,
)
