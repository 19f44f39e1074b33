"""Learning-rate schedules as pure functions of the epoch, so that every stage knows its rate without asking."""

import math
from collections.abc import Callable, Sequence

__all__ = ["LR_SCHEDULES", "constant", "cosine", "lr_schedule", "multi_step"]

LR_SCHEDULES = ("none", "MultiStepLR", "CosineAnnealingLR")


def constant(epoch: int) -> float:
    """The initial rate throughout."""
    return 1.0


def multi_step(milestones: Sequence[int], gamma: float) -> Callable[[int], float]:
    """Times `gamma` at every milestone epoch, as torch.optim.lr_scheduler.MultiStepLR."""
    if any(m < 0 for m in milestones):
        raise ValueError(f"milestones are epochs from 0, got {list(milestones)}")
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)


def cosine(epochs: int) -> Callable[[int], float]:
    """Half a cosine from the initial rate to 0 over `epochs`, as CosineAnnealingLR (Loshchilov and Hutter 2017)."""
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def lr_schedule(name: str, *, epochs: int, milestones: Sequence[int], gamma: float) -> Callable[[int], float]:
    """The schedule of that name.

    Raises:
        ValueError: lists the valid names.
    """
    if name == "none":
        return constant
    if name == "MultiStepLR":
        return multi_step(milestones, gamma)
    if name == "CosineAnnealingLR":
        return cosine(epochs)
    raise ValueError(f"lr scheduler {name!r} is not known; valid: {', '.join(LR_SCHEDULES)}")
