"""One call per step for a layer's optimizer: torch.optim's Adam, AdamW and SGD without what surrounds their arithmetic.

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

__all__ = ["NativeOptimizer", "from_torch"]

_KINDS: dict[type, tuple[str, ...]] = {
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}
_UNSUPPORTED = ("amsgrad", "maximize", "differentiable", "capturable", "dampening")


def from_torch(optimizer: Any) -> "NativeOptimizer | None":
    """Takes over `optimizer`; None where it is of another kind, or has options that the kernels don't know.

    They know float32 parameters on the CPU in dense memory, one group of them, no hooks, and a learning rate that is
    a number.
    """
    if type(optimizer) not in _KINDS or len(optimizer.param_groups) != 1:
        return None
    group = optimizer.param_groups[0]
    known = not any(group.get(name) for name in _UNSUPPORTED) and not isinstance(group["lr"], Tensor)
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if not known or hooked or not all(_is_dense(p) for p in group["params"]):
        return None
    return NativeOptimizer(optimizer)


class NativeOptimizer:
    """Stands in for the torch.optim optimizer that it was made from, which keeps all state.

    Args:
        wrapped: the optimizer; Adam, AdamW or SGD over float32 parameters on the CPU.
    """

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        self.wrapped = wrapped
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
        """Updates all parameters from `grads`, one per parameter; default: their `.grad`."""
        given = [g for g in ([p.grad for p in self._params] if grads is None else grads) if g is not None]
        if len(given) != len(self._params):
            raise ValueError(f"step needs one gradient per parameter: {len(self._params)}, got {len(given)}")
        # Held until the call is over: a gradient that lies otherwise than its parameter is copied.
        aligned = [g if g.stride() == p.stride() else _like(g, p) for g, p in zip(given, self._params, strict=True)]
        for i, grad in enumerate(aligned):
            self._grads[i] = grad.data_ptr()
        first = not self._pointers and self._prepare()
        if isinstance(self.wrapped, torch.optim.SGD):
            self._sgd(first)
        else:
            self._adam()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.wrapped.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wrapped.load_state_dict(state_dict)
        self._params = self.wrapped.param_groups[0]["params"]
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
            int(isinstance(self.wrapped, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))),
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
        state, names = self.wrapped.state, _KINDS[type(self.wrapped)]
        if isinstance(self.wrapped, torch.optim.SGD) and not self.param_groups[0]["momentum"]:
            names = ()
        new = any(state[p].get(name) is None for p in self._params for name in names)
        for p in self._params:
            for name in names:
                if new:
                    state[p][name] = torch.zeros_like(p)
                elif state[p][name].stride() != p.stride():  # SGD's first buffer lies as the gradient did
                    state[p][name] = _like(state[p][name], p)
            if new and not isinstance(self.wrapped, torch.optim.SGD):
                state[p]["step"] = torch.zeros((), dtype=torch.float32)
        tensors = {name: [state[p][name] for p in self._params] for name in names}
        if names and not isinstance(self.wrapped, torch.optim.SGD):
            tensors["step"] = [state[p]["step"] for p in self._params]
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
