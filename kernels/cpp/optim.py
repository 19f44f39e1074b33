"""One call per step for a layer's optimizer: torch.optim's Adam, AdamW and SGD, and `AdamWSF`, as arithmetic alone.

For the small tensors of a layer, torch's fused optimizers spend most of their time outside of their kernels;
docs/performance.md has what a step gains. `from_torch` takes over such an optimizer: hyperparameters
and state stay in the library's object, so state dicts, learning-rate changes and resumes are the library's own.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unlocked.kernels.cpp.bindings import load_kernels
from unlocked.kernels.optim import gradients_of, kind_of
from unlocked.kernels.schedule_free import AdamWSF, StepSize

__all__ = ["NativeOptimizer", "from_torch"]

_STATE_NAMES: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_sf": ("z", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}


def from_torch(optimizer: Any) -> "NativeOptimizer | None":
    """Takes over `optimizer`; None where it is of another kind, or has options that the kernels don't know.

    Taken are the kinds above, as `kernels.optim.kind_of` knows them, over float32 parameters on the CPU in dense
    memory, in one group.
    """
    kind = kind_of(optimizer)
    if kind not in _STATE_NAMES or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    if group.get("capturable") or not all(_is_dense(p) for p in group["params"]):
        return None
    return NativeOptimizer(optimizer, kind)


class NativeOptimizer:
    """Stands in for the optimizer that it was made from, which keeps all state.

    Args:
        wrapped: the optimizer, over float32 parameters on the CPU.
        kind: what it computes: "adam", "adamw", "adamw_sf" or "sgd".
    """

    def __init__(self, wrapped: torch.optim.Optimizer, kind: str) -> None:
        self.wrapped = wrapped
        self.kind = kind
        self._params: list[Tensor] = wrapped.param_groups[0]["params"]
        count = len(self._params)
        self._sizes = (ctypes.c_int64 * count)(*(p.numel() for p in self._params))
        self._grads = (ctypes.c_void_p * count)()
        self._pointers: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The library's: one group, to be read and written."""
        return self.wrapped.param_groups

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor] | None = None) -> None:
        """Updates all parameters from `grads`, one per parameter; default: their `.grad`.

        Raises:
            ValueError: a missing gradient; a closure; a schedule-free optimizer in evaluation mode.
        """
        given = [g for g in gradients_of(self._params, grads) if g is not None]
        if len(given) != len(self._params):
            raise ValueError(f"step needs one gradient per parameter: {len(self._params)}, got {len(given)}")
        if self.kind == "adamw_sf" and not self.param_groups[0]["train_mode"]:
            raise ValueError("the schedule-free optimizer is in evaluation mode; call train() before step()")
        # Held until the call is over: a gradient that lies otherwise than its parameter is copied.
        aligned = [g if g.stride() == p.stride() else _like(g, p) for g, p in zip(given, self._params, strict=True)]
        for i, grad in enumerate(aligned):
            self._grads[i] = grad.data_ptr()
        first = not self._pointers and self._prepare()
        if self.kind == "sgd":
            self._sgd(first)
        elif self.kind == "adamw_sf":
            self._adamw_sf()
        else:
            self._adam()

    def train(self) -> None:
        """Schedule-free: puts the weights at which gradients are taken (y) into the parameters. Others: nothing."""
        if isinstance(self.wrapped, AdamWSF):
            self.wrapped.train()

    def eval(self) -> None:
        """Schedule-free: puts the averaged weights (x), the training's result, into the parameters. Others: nothing."""
        if isinstance(self.wrapped, AdamWSF):
            self.wrapped.eval()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wrapped.load_state_dict(state_dict)
        self._params = self.wrapped.param_groups[0]["params"]
        self._pointers = {}

    def exact_state(self) -> dict[str, Any]:
        """What `load_exact_state` takes, in the order of the parameters; unlike `state_dict` it does without torch's
        compiler, which takes seconds to import."""
        group = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        return {"group": group, "state": [dict(self.wrapped.state.get(p, {})) for p in self._params]}

    def load_exact_state(self, state: dict[str, Any]) -> None:
        """Takes over the state of an optimizer like this one, tensors as they are."""
        self.param_groups[0].update(state["group"])
        for p, its in zip(self._params, state["state"], strict=True):
            if its:
                self.wrapped.state[p] = its
        self._pointers = {}

    def _adam(self) -> None:
        group, found = self.param_groups[0], self._pointers
        beta1, beta2 = group["betas"]
        load_kernels().unlocked_adam(
            len(self._params),
            self._sizes,
            found["params"],
            self._grads,
            found["exp_avg"],
            found["exp_avg_sq"],
            found["step"],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            int(self.kind == "adamw"),
            torch.get_num_threads(),
        )

    def _adamw_sf(self) -> None:
        group, found = self.param_groups[0], self._pointers
        size = StepSize.advance(group)
        load_kernels().unlocked_adamw_sf(
            len(self._params),
            self._sizes,
            found["params"],
            self._grads,
            found["z"],
            found["exp_avg_sq"],
            size.rate,
            size.share,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            torch.get_num_threads(),
        )

    def _sgd(self, first: bool) -> None:
        group, found = self.param_groups[0], self._pointers
        load_kernels().unlocked_sgd(
            len(self._params),
            self._sizes,
            found["params"],
            self._grads,
            found.get("momentum_buffer"),
            group["lr"],
            group["momentum"],
            group["weight_decay"],
            int(group["nesterov"]),
            int(first),
            torch.get_num_threads(),
        )

    def _prepare(self) -> bool:
        """Makes the state that the library would make in its first step, and notes where everything lies. Whether
        the state is new."""
        state, names = self.wrapped.state, _STATE_NAMES[self.kind]
        if self.kind == "sgd" and not self.param_groups[0]["momentum"]:
            names = ()
        counts = self.kind in ("adam", "adamw")  # a tensor's steps
        new = any(state[p].get(name) is None for p in self._params for name in names)
        for p in self._params:
            for name in names:
                if new:  # z starts at the weights
                    state[p][name] = p.detach().clone() if name == "z" else torch.zeros_like(p)
                elif state[p][name].stride() != p.stride():  # SGD's first buffer lies as the gradient did
                    state[p][name] = _like(state[p][name], p)
            if new and counts:
                state[p]["step"] = torch.zeros((), dtype=torch.float32)
        tensors = {name: [state[p][name] for p in self._params] for name in (*names, *(["step"] if counts else []))}
        for name, values in {"params": self._params, **tensors}.items():
            self._pointers[name] = (ctypes.c_void_p * len(values))(*(v.data_ptr() for v in values))
        return new


def _is_dense(p: Tensor) -> bool:
    formats = (torch.contiguous_format, *((torch.channels_last,) if p.dim() == 4 else ()))
    dense = any(p.is_contiguous(memory_format=f) for f in formats)
    return p.device.type == "cpu" and p.dtype == torch.float32 and dense


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    """`grad` in the memory layout of `parameter`."""
    return torch.empty_like(parameter).copy_(grad)
