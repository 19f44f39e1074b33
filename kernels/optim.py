"""Which of a library's optimizers the fused ones may stand in for: one answer for all backends.

A fused optimizer does the arithmetic of a step and nothing else. Whatever else would happen in the library's step
(hooks, a subclass's own code, a differentiable step) would be lost in silence, so such optimizers stay as they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from unlocked.kernels.schedule_free import AdamWSF

__all__ = ["gradients_of", "kind_of"]

_KINDS: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    AdamWSF: "adamw_sf",
}
# By name: the package schedulefree is not imported, only recognised.
_SCHEDULEFREE_KINDS = {"AdamWScheduleFree": "schedule_free_adamw", "SGDScheduleFree": "schedule_free_sgd"}
_OPTIONS = ("amsgrad", "maximize", "differentiable", "dampening")
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")


def kind_of(optimizer: Any) -> str | None:
    """What a fused optimizer has to compute to stand in for `optimizer`; None: nothing but itself can.

    One of "sgd", "adam", "adamw" (torch.optim's), "adamw_sf" (`AdamWSF`), "schedule_free_adamw" and
    "schedule_free_sgd" (the package schedulefree's). None for
      - any other type, subclasses included, and an object whose methods were replaced;
      - hooks, be they this optimizer's or registered for all;
      - amsgrad, maximize, differentiable, dampening; torch's foreach=True, which asks for that very implementation;
      - options that are tensors (whoever holds one may change it in place).
    It is asked once, when a layer is built: what is registered or replaced later is not seen.
    """
    found = type(optimizer)
    kind = _KINDS.get(found)
    if found.__module__.partition(".")[0] == "schedulefree":
        kind = _SCHEDULEFREE_KINDS.get(found.__name__)
    if kind is None or _is_altered(optimizer):
        return None
    for group in optimizer.param_groups:
        if any(group.get(name) for name in _OPTIONS) or (found in _KINDS and group.get("foreach")):
            return None
        options = [value for key, value in group.items() if key != "params"]
        if any(isinstance(item, Tensor) for value in options for item in (value if _is_pair(value) else [value])):
            return None
    if kind == "adam" and optimizer.param_groups[0].get("decoupled_weight_decay"):
        return "adamw"
    return kind


def gradients_of(params: list[Tensor], grads: Any) -> list[Tensor | None]:
    """What a fused `step(grads)` works on: as many gradients as parameters; of None, the parameters' own.

    Raises:
        ValueError: a closure, which only the library's optimizers call; another number of gradients.
    """
    if callable(grads):
        raise ValueError("step takes gradients, not a closure; compute the loss and its gradients before the step")
    given = [p.grad for p in params] if grads is None else list(grads)
    if len(given) != len(params):
        raise ValueError(f"step needs one gradient per parameter: {len(params)}, got {len(given)}")
    return given


def _is_altered(optimizer: Any) -> bool:
    """Something happens around the class's own step, or instead of it."""
    if any(name in vars(optimizer) for name in ("step", "train", "eval")):
        return True
    hooks = [getattr(optimizer, name, None) for name in _HOOKS]
    return any(hooks) or any(getattr(torch_optimizer, name, None) for name in _GLOBAL_HOOKS)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple | list)
