"""The global generators, seeded by a key for as long as somebody draws from them.

Attention's and LSTM's dropout, RReLU, a function call in someone's forward(): what can't be given a generator of its
own draws from the one of the process. Inside `keyed` that one is seeded, and afterwards it is what it was before.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DRAWING", "SOURCES", "GlobalGenerators", "mixed"]

SOURCES = ("torch", "random", "numpy")
"""Who has a global generator: torch (one per device), Python's `random`, NumPy's legacy functions."""

DRAWING = threading.RLock()
"""Held while the global generators are seeded by a key, and by whoever lets foreign code draw in another thread."""

_MASK = 0xFFFFFFFFFFFFFFFF


class _Generator(NamedTuple):
    source: str
    seed: Callable[[int], Any]
    get_state: Callable[[], Any]
    set_state: Callable[[Any], Any]


class GlobalGenerators:
    """Those of `sources`: torch's of the CPU, and of `device` if that is another.

    Seeding and putting back cost microseconds; `torch.random.fork_rng` would touch every device.
    """

    def __init__(self, sources: Iterable[str], device: torch.device) -> None:
        self.sources = frozenset(sources)
        self._all: list[_Generator] = []
        if "torch" in self.sources:
            of_torch = [torch.default_generator]
            if device.type == "cuda":
                torch.cuda.init()
                index = torch.cuda.current_device() if device.index is None else device.index
                of_torch.append(torch.cuda.default_generators[index])
            self._all += [_Generator("torch", g.manual_seed, g.get_state, g.set_state) for g in of_torch]
        if "random" in self.sources:
            self._all.append(_Generator("random", random.seed, random.getstate, random.setstate))
        if "numpy" in self.sources:
            legacy = np.random
            self._all.append(_Generator("numpy", _seed_numpy, legacy.get_state, legacy.set_state))

    @contextlib.contextmanager
    def keyed(self, key: int) -> Iterator[None]:
        """Inside, every draw follows from `key`, an integer of 64 bits."""
        with DRAWING:
            states = [one.get_state() for one in self._all]
            try:
                for one in self._all:
                    one.seed(key)
                yield
            finally:
                for one, state in zip(self._all, states, strict=True):
                    one.set_state(state)

    def states(self) -> list[Any]:
        """To be compared by `moved`."""
        return [one.get_state() for one in self._all]

    def moved(self, before: list[Any]) -> frozenset[str]:
        """The sources that something was drawn from since `before`."""
        pairs = zip(self._all, before, strict=True)
        return frozenset(one.source for one, state in pairs if not _equal(one.get_state(), state))


def mixed(base: int, step: int) -> int:
    """64 bits for every (base, step): the output function of SplitMix64 (Steele, Lea, Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014) at the `step`-th state after `base`. Costs half a microsecond."""
    z = (base + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _seed_numpy(key: int) -> None:
    np.random.seed(key & 0xFFFFFFFF)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
