"""Where the generators stood that a loader may draw from as a run begins, kept with its snapshots.

A resumed run finds them there: in a notebook, say, the one that was interrupted has moved them, and a script may have
drawn more or less before it.
"""

import base64
import random
from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from unlocked.data import Dataset
from unlocked.data.loader import LoaderDataset

__all__ = ["generator_states", "loader_generators", "set_generators"]

_INTS = "I"  # Python's generator and NumPy's hold 32-bit numbers


def loader_generators(*data: Dataset | None) -> list[torch.Generator]:
    """Those of the loaders' own, each once: of a DataLoader and of its samplers."""
    found: list[torch.Generator] = []
    for one in data:
        loader = getattr(one, "loader", None)
        holders = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
        candidates = [getattr(holder, "generator", None) for holder in holders]
        found += [own for own in candidates if isinstance(own, torch.Generator) and all(own is not f for f in found)]
    return found


def generator_states(*data: Dataset | None) -> dict[str, Any]:
    """Of the loaders among the data and of the three global generators, as JSON values; without loaders: none."""
    if not any(isinstance(one, LoaderDataset) for one in data):
        return {}
    version, numbers, gauss = random.getstate()
    states: dict[str, Any] = {
        "loaders": [_text(own.get_state()) for own in loader_generators(*data)],
        "torch": _text(torch.get_rng_state()),
        "random": [version, base64.b64encode(array(_INTS, numbers).tobytes()).decode(), gauss],
    }
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] == "MT19937":  # what NumPy has, unless somebody has put another one there
        key = np.asarray(state["state"]["key"], dtype=np.uint32)
        where = [int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])]
        states["numpy"] = [base64.b64encode(key.tobytes()).decode(), *where]
    return states


def set_generators(states: Mapping[str, Any], *data: Dataset | None) -> None:
    """Puts them where `generator_states` found them; what has no state there stays where it is."""
    for own, text in zip(loader_generators(*data), states.get("loaders", ()), strict=False):
        own.set_state(_state(text))
    if "torch" in states:
        torch.set_rng_state(_state(states["torch"]))
    if "random" in states:
        version, text, gauss = states["random"]
        numbers = array(_INTS, base64.b64decode(text))
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        text, *where = states["numpy"]
        np.random.set_state(("MT19937", np.frombuffer(base64.b64decode(text), dtype=np.uint32), *where))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
