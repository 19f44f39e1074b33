"""One choice of backend for all operations: `auto | torch | triton | cuda | cpp`.

A backend asked for by name raises if it can't run; `auto` takes Triton on a CUDA device and C++ on a CPU, and falls
back to plain PyTorch with one warning.
"""

import importlib
import warnings
from types import ModuleType
from typing import get_args

import torch

from unlocked.kernels import BackendName

__all__ = ["BACKENDS", "get_backend"]

BACKENDS: tuple[str, ...] = get_args(BackendName)
_warned: set[str] = set()


def get_backend(name: str, device: torch.device | str) -> ModuleType:
    """The module whose `local_head`, `norm_act_forward`, `norm_act_backward`, `norm_act_backward_full` and
    `load_batch` run on `device`.

    Raises:
        ValueError: the name is not known, or a backend asked for by name can't run (says what is missing).
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"kernels {name!r} is not known; valid: {', '.join(BACKENDS)}")
    if name == "auto":
        return _automatic(device)
    if name == "torch":
        return importlib.import_module("unlocked.kernels.reference")
    module = importlib.import_module(f"unlocked.kernels.{name}")
    if problem := module.unavailable(device):
        raise ValueError(f"kernels {name!r} can't run on {device}: {problem}")
    return module


def _automatic(device: torch.device) -> ModuleType:
    module = importlib.import_module(f"unlocked.kernels.{'triton' if device.type == 'cuda' else 'cpp'}")
    problem = module.unavailable(device)
    if not problem:
        return module
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"kernels: falling back to plain PyTorch: {problem}", stacklevel=3)
    return importlib.import_module("unlocked.kernels.reference")
