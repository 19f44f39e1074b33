"""One choice of backend for all operations: `auto | torch | triton | cuda | cpp | triton_joined | cpp_winograd`.

A backend asked for by name raises if it can't run; `auto` takes Triton on a CUDA device and C++ on a CPU, and falls
back to plain PyTorch with one warning.
"""

import importlib
import warnings
from types import ModuleType
from typing import Any, get_args

import torch

from unlocked.kernels import BackendName

__all__ = ["BACKENDS", "fuse_optimizer", "get_backend"]

BACKENDS: tuple[str, ...] = get_args(BackendName)
_MODULES = {"torch": "reference", "triton_joined": "triton.joined", "cpp_winograd": "cpp.winograd"}  # others: as named
_AUTOMATIC = ("triton", "cpp")  # whichever is made for the device
_warned: set[str] = set()


def get_backend(name: str, device: torch.device | str) -> ModuleType:
    """The module whose `local_head`, `norm_act_forward`, `norm_act_backward`, `norm_act_backward_full` and
    `load_batch` run on `device`; its `ABILITIES` say what else it can do.

    Raises:
        ValueError: the name is not known, or a backend asked for by name can't run (says what is missing).
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"kernels {name!r} is not known; valid: {', '.join(BACKENDS)}")
    if name == "auto":
        return _automatic(device)
    module = _load(name)
    if problem := module.unavailable(device):
        raise ValueError(f"kernels {name!r} can't run on {device}: {problem}")
    return module


def fuse_optimizer(backend: ModuleType, optimizer: Any, device: torch.device, *, every_gradient: bool) -> Any:
    """A library's `optimizer` as one kernel for all of its parameters on `device`, with its options and its state,
    where the backend has fused optimizers that take it over; else the optimizer itself.

    Args:
        every_gradient: every step brings a gradient for every parameter.
    """
    abilities = backend.ABILITIES
    if abilities.optimizers is None or not (every_gradient or abilities.partial_gradients):
        return optimizer
    if _load(abilities.optimizers).unavailable(device):
        return optimizer
    return _load(f"{abilities.optimizers}.optim").from_torch(optimizer) or optimizer


def _automatic(device: torch.device) -> ModuleType:
    made_for = (module for module in map(_load, _AUTOMATIC) if device.type in module.ABILITIES.devices)
    module = next(made_for, None)
    problem = module.unavailable(device) if module else f"there are no fused kernels for {device.type}"
    if module and not problem:
        return module
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"kernels: falling back to plain PyTorch: {problem}", stacklevel=3)
    return _load("torch")


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"unlocked.kernels.{_MODULES.get(name, name)}")
