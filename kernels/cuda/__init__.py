"""The CUDA C++ backend: the functions of `unlocked.kernels.reference` as fused kernels, compiled on first use."""

from unlocked.kernels.abilities import Abilities
from unlocked.kernels.cuda.bindings import unavailable
from unlocked.kernels.cuda.head import local_head
from unlocked.kernels.cuda.images import load_batch
from unlocked.kernels.cuda.norm_act import norm_act_backward, norm_act_backward_full, norm_act_forward
from unlocked.kernels.cuda.weight_grad import norm_act_weight_grad

__all__ = [
    "ABILITIES",
    "load_batch",
    "local_head",
    "norm_act_backward",
    "norm_act_backward_full",
    "norm_act_forward",
    "norm_act_weight_grad",
    "unavailable",
]

ABILITIES = Abilities(devices=frozenset({"cuda"}), optimizers="triton", partial_gradients=True)
