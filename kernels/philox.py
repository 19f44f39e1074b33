"""Random numbers that depend on a key alone: Philox 4x32-10, in integer tensor arithmetic.

Placement must never change a result, so nothing random in this project draws from a generator with a
state. Whoever needs a number asks for it by its key (seed, purpose) and its counter (epoch or micro-batch,
sample, draw). The same integers come out on every device and in a captured CUDA graph.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants and
round function from section 4, checked in the tests against the published known-answer vectors.
"""

from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Purpose", "keyed_uniform", "philox4x32", "philox_int"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a number is drawn for: the second half of every key, so that no two uses share a stream."""

    INIT = 1
    SHUFFLE = 2
    AUGMENT = 3
    DROPOUT = 4
    STATISTICS = 5
    SYNTHETIC = 6
    RULE = 7
    DRAW = 8
    CLASSES = 9
    VIEWS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for every counter.

    Args:
        counter: four int64 tensors that broadcast together, values in [0, 2**32).
        key: two int64 tensors that broadcast with the counter, values in [0, 2**32).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for step in range(_ROUNDS):
        if step:
            k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
        # The product wraps modulo 2**64, which leaves both halves right; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
    return c0, c1, c2, c3


def philox_int(seed: int, purpose: Purpose, *counter: int) -> int:
    """One 63-bit integer for (seed, purpose, counter): the seed of a library generator, for instance."""
    words = [torch.tensor(value & _MASK, device="cpu") for value in (*counter, 0, 0, 0, 0)[:4]]
    low, high, *_ = philox4x32((words[0], words[1], words[2], words[3]), _key(seed, purpose))
    return (int(high) & 0x7FFFFFFF) << 32 | int(low)


def keyed_uniform(
    seed: int, purpose: Purpose, counter: Tensor, major: Tensor | int, minor: int = 0, *, high: int = 0
) -> Tensor:
    """Uniform float32 numbers in [0, 1) with 24 random bits, four for every counter.

    Args:
        seed: the run's seed, any integer.
        counter: int64 [...], the finest index (sample or element).
        major: int64 scalar tensor (on the device, so that a CUDA graph can advance it) or int: epoch or micro-batch.
        minor: a second index, such as the layer.
        high: counts from high * 2**32 on. (Added to `counter` it would be right as well, but torch.compile adds a
            number to an arange in 32 bits on a GPU, and fails.)

    Returns:
        float32 [..., 4].
    """
    device = counter.device
    major = torch.as_tensor(major, dtype=torch.int64, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    words = philox4x32(
        (counter & _MASK, ((counter >> 32) + (zero + high)) & _MASK, major & _MASK, zero + minor),
        _key(seed, purpose, device),
    )
    return torch.stack([(word >> 8).to(torch.float32) * 2.0**-24 for word in words], dim=-1)


def _key(seed: int, purpose: Purpose, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The run's seed folds to 32 bits; the purpose is the other word."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    # full() rather than tensor(): a fill is allowed inside a CUDA graph capture, a copy from pageable memory is not.
    return (
        torch.full((), low ^ (high * 0x9E3779B1 & _MASK), dtype=torch.int64, device=device),
        torch.full((), int(purpose), dtype=torch.int64, device=device),
    )
