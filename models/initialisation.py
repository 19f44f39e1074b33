"""Start values of a block that depend on (seed, layer) alone, not on which blocks were made before it."""

import copy

import torch
from torch import nn

from unlocked.kernels.philox import Purpose, philox_int

__all__ = ["initialise"]


def initialise(block: nn.Module, seed: int, layer: int) -> None:
    """Re-initialise, in place, every submodule that has `reset_parameters`; PyTorch's default distributions.

    The draws are made on the CPU, in logical order, under a generator of their own: the same weights on every
    device and in every memory format, and the global random states are left as they were. Parameters of modules
    without `reset_parameters` keep their values.
    """
    # A copy, because reset_parameters fills a tensor in the order of its memory, from its device's generator.
    fresh = copy.deepcopy(block).to("cpu")
    for parameter in fresh.parameters():
        parameter.data = parameter.data.contiguous()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # Not torch.manual_seed, which would seed every accelerator too.
        torch.default_generator.manual_seed(philox_int(seed, Purpose.INIT, layer))
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        block.load_state_dict(fresh.state_dict())
