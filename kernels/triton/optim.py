"""Fused optimizers: all parameters of a stage are updated by one kernel launch that a CUDA graph can capture.

`FusedOptimizer` stands in for torch.optim's SGD, Adam and AdamW, for `AdamWSF`, and for the schedulefree package's
AdamWScheduleFree and SGDScheduleFree; `from_torch` takes over one of those. Their update rules are in `optim_kernels`.
"""

import math
from collections import UserDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unlocked.kernels.optim import gradients_of, kind_of
from unlocked.kernels.triton.optim_checks import SCHEDULE_FREE, beta1_of, check_options, check_params, matching_gradient
from unlocked.kernels.triton.optim_kernels import AOT_SPECS, CHUNK, COUNTERS, HYPER, step_kernel

__all__ = ["AOT_SPECS", "KINDS", "FusedOptimizer", "from_torch"]

_MAX_TENSORS = 32  # tensors of a launch; more take several launches

_AVERAGING = {"warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0}
_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# The options of each kind with the defaults of torch.optim and schedulefree.
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False},
    "adam": {"lr": 1e-3, **_ADAM},
    "adamw": {"lr": 1e-3, **_ADAM, "weight_decay": 1e-2},
    "adamw_sf": {"lr": 0.0025, **_ADAM, **_AVERAGING},
    "schedule_free_adamw": {"lr": 0.0025, **_ADAM, **_AVERAGING},
    "schedule_free_sgd": {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.0, **_AVERAGING},
}
# The names of the two state buffers, as the libraries' state dicts have them ("" where a kind has only one).
_STATE_NAMES = {
    "sgd": ("momentum_buffer", ""),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_sf": ("z", "exp_avg_sq"),
    "schedule_free_adamw": ("z", "exp_avg_sq"),
    "schedule_free_sgd": ("z", ""),
}
# Entries that the library's groups need when they load one of our state dicts.
_LIBRARY_ENTRIES: dict[str, dict[str, Any]] = {
    "sgd": {"dampening": 0.0},
    "adam": {},
    "adamw": {"decoupled_weight_decay": True},
    "adamw_sf": {},
    "schedule_free_adamw": {"foreach": True, "scheduled_lr": 0.0},
    "schedule_free_sgd": {"foreach": True, "scheduled_lr": 0.0},
}


class FusedOptimizer:
    """Stands in for a library's optimizer over float32 tensors of one device.

    Args:
        params: the parameters; contiguous or channels-last, float32.
        kind: one of `KINDS`: "sgd", "adam", "adamw", "adamw_sf", "schedule_free_adamw", "schedule_free_sgd".
        options: the options of `KINDS[kind]`, with the meaning and the defaults they have in the library.

    There is one parameter group. Its entries (lr, betas, ...) can be read and written, which also reaches a captured
    graph; the write is ordered on the current stream. `warmup_steps`, `nesterov` and a momentum of zero are fixed.
    A schedule-free optimizer starts in evaluation mode, as the library's does: call `train()` before the first step.

    Raises:
        ValueError: an option, a parameter or a gradient that the kernel can't take; a closure; a step in evaluation
            mode.
    """

    def __init__(self, params: Iterable[Tensor], kind: str = "adam", **options: Any) -> None:
        if kind not in KINDS:
            raise ValueError(f"optimizer kind {kind!r} is not known; valid: {', '.join(KINDS)}")
        if unknown := options.keys() - KINDS[kind].keys():
            raise ValueError(f"{kind} does not take {sorted(unknown)}; valid: {', '.join(KINDS[kind])}")
        self.kind = kind
        self._params = list(params)
        check_params(self._params)
        self._schedule_free = kind in SCHEDULE_FREE
        settings = {**KINDS[kind], **options}
        check_options(kind, settings)
        self._momentum = kind == "sgd" and settings["momentum"] > 0

        device = self._params[0].device
        chunks = [triton.cdiv(p.numel(), CHUNK) for p in self._params]
        self._first_chunk = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
        total = max(self._first_chunk[-1], 1)
        self._counters = torch.zeros(total, COUNTERS, dtype=torch.float64, device=device)
        self._counters[:, 2] = -1.0  # lr_max starts below every learning rate
        self._states = [
            torch.zeros(total * CHUNK, device=device) if name and (kind != "sgd" or self._momentum) else None
            for name in _STATE_NAMES[kind]
        ]
        self._hyper = torch.zeros(HYPER, dtype=torch.float64, device=device)
        self._pushed = [0.0] * HYPER
        self._launches: dict[tuple[bool, ...], list[_Launch]] = {}
        self._copies: dict[int, Tensor] = {}  # by the parameter's number
        if self._schedule_free:
            settings["train_mode"] = False
        self.param_groups = [_Group(settings, self._params, self._push)]
        self._push(self.param_groups[0])

    def step(self, grads: Sequence[Tensor | None] | None = None) -> None:
        """Updates all parameters from `grads` (as many as parameters, float32 or bfloat16; default: their `.grad`).

        A parameter whose gradient is None is left alone, its step count included; but a schedule-free optimizer counts,
        as the library's, the steps of all together.
        """
        if self._schedule_free and not self.param_groups[0]["train_mode"]:
            raise ValueError("the schedule-free optimizer is in evaluation mode; call train() before step()")
        params = self._params
        given = gradients_of(params, grads)
        present = tuple(g is not None for g in given)
        if present not in self._launches:
            self._launches[present] = self._launches_for(present)
        first, second = self._states
        any_copy = next(iter(self._copies.values()), params[0])
        for launch in self._launches[present]:
            matching = tuple(matching_gradient(given, params, i) for i in launch.tensors)
            narrow = tuple(int(g.dtype == torch.bfloat16) for g in matching)
            copied = tuple(int(i in self._copies) for i in launch.tensors)
            step_kernel[(launch.programs,)](
                tuple(params[i] for i in launch.tensors),
                matching,
                tuple(self._copies.get(i, any_copy) for i in launch.tensors),
                self._counters if first is None else first,
                self._counters if second is None else second,
                self._counters,
                self._hyper,
                SIZES=launch.sizes,
                PROGRAMS=launch.first_programs,
                CHUNKS=launch.first_chunks,
                NARROW=narrow * any(narrow),
                COPIED=copied * any(copied),
                KIND=self.kind,
                MOMENTUM=self._momentum,
                NESTEROV=bool(self.param_groups[0].get("nesterov", False)),
                CHUNK=CHUNK,
                num_warps=4,
            )

        if self._schedule_free:
            self._count_without(present)

    @torch.no_grad()
    def _count_without(self, present: Sequence[bool]) -> None:
        """A schedule-free step of the tensors that have no gradient in it."""
        for i, p in enumerate(self._params):
            if not present[i] and p.numel():
                z = self._state_view(0, i)
                z.copy_(torch.where(self._counter(i, 0) > 0, z, p))  # where it starts with the first gradient, too
                _count_step(self._counters[self._first_chunk[i] : self._first_chunk[i + 1]], self._hyper, self.kind)

    @torch.no_grad()
    def bfloat16_of(self, param: Tensor) -> Tensor:
        """A parameter's bfloat16 copy, which every step writes; after other changes `renew_bfloat16` does."""
        number = [id(p) for p in self._params].index(id(param))
        if number not in self._copies:
            self._copies[number] = param.detach().to(torch.bfloat16, copy=True)
        return self._copies[number]

    @torch.no_grad()
    def renew_bfloat16(self) -> None:
        for number, copy in self._copies.items():
            copy.copy_(self._params[number])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the parameters' gradients, or fills them with zeros."""
        for p in self._params:
            if p.grad is not None:
                if set_to_none:
                    p.grad = None
                else:
                    p.grad.detach_().zero_()

    def train(self) -> None:
        """Schedule-free: puts the weights at which gradients are taken (y) into the parameters. Others: nothing."""
        self._switch(True)

    def eval(self) -> None:
        """Schedule-free: puts the averaged weights (x), the training's result, into the parameters. Others: nothing."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        group = self.param_groups[0]
        if not self._schedule_free or group["train_mode"] == training:
            return
        beta1 = beta1_of(group)
        for i, p in enumerate(self._params):
            if p.numel():
                # Before its first step a tensor has no z yet, and stays.
                z = torch.where(self._counter(i, 0) > 0, self._state_view(0, i), p)
                p.lerp_(z, 1 - beta1 if training else 1 - 1 / beta1)
        group["train_mode"] = training

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of the library's optimizer of this kind, which can load it; tensors are copies.

        Schedule-free kinds wait for the device: the library keeps their counters as Python numbers in the group.
        """
        state: dict[int, dict[str, Tensor]] = {}
        for i, p in enumerate(self._params):
            names = [
                (slot, name) for slot, name in enumerate(_STATE_NAMES[self.kind]) if self._states[slot] is not None
            ]
            if not p.numel() or not names:
                continue
            state[i] = {name: self._state_view(slot, i).clone() for slot, name in names}
            if self._schedule_free:
                state[i]["counters"] = self._counters[self._first_chunk[i], :3].clone()
                if not self._counter(i, 0):
                    del state[i]  # the library makes z in a tensor's first step
            elif self.kind != "sgd":
                state[i]["step"] = self._counter(i, 0).float()
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        if self._schedule_free:
            steps, weight_sum, lr_max, _ = self._counters[self._counters[:, 0].argmax()].tolist()
            group |= {"k": int(steps), "weight_sum": weight_sum, "lr_max": lr_max}
        group |= _LIBRARY_ENTRIES[self.kind]
        group["params"] = list(range(len(self._params)))
        return {"state": state, "param_groups": [group]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a state dict of this class, or of the library's optimizer of this kind."""
        groups = state_dict["param_groups"]
        named = [{key: _plain(group.get(key)) for key in KINDS[self.kind]} for group in groups]
        indices = [index for group in groups for index in group["params"]]
        if len(indices) != len(self._params) or any(other != named[0] for other in named[1:]):
            raise ValueError(
                f"the state is of {len(indices)} parameters in {len(groups)} groups; this optimizer has "
                f"{len(self._params)} parameters in one group (several groups must have equal options)"
            )
        if missing := [key for key, value in named[0].items() if value is None]:
            raise ValueError(f"the state is not of a {self.kind} optimizer: its group has no {', '.join(missing)}")
        self.param_groups[0].update(named[0])
        self._counters.zero_()
        self._counters[:, 2] = -1.0
        for buffer in self._states:
            if buffer is not None:
                buffer.zero_()
        for position, index in enumerate(indices):
            if self._params[position].numel():
                self._load_tensor(position, state_dict["state"].get(index, {}), groups[0])
        if self._schedule_free:
            self.param_groups[0]["train_mode"] = bool(groups[0].get("train_mode", False))

    def _load_tensor(self, i: int, state: dict[str, Any], group: dict[str, Any]) -> None:
        for slot, name in enumerate(_STATE_NAMES[self.kind]):
            if self._states[slot] is not None and state.get(name) is not None:
                view = self._state_view(slot, i)
                if state[name].shape != view.shape:
                    raise ValueError(
                        f"{name} of parameter {i} has shape {list(state[name].shape)}, the parameter {list(view.shape)}"
                    )
                view.copy_(state[name])
        rows = self._counters[self._first_chunk[i] : self._first_chunk[i + 1]]
        # To the last bit, unless steps of the library came since, which takes them along as they are.
        if "counters" in state and float(state["counters"][0]) == group.get("k"):
            rows[:, :3] = torch.as_tensor(state["counters"]).to(rows)
        elif self._schedule_free and group.get("k"):
            rows[:, :3] = torch.tensor([group["k"], group["weight_sum"], group["lr_max"]], dtype=torch.float64).to(rows)
            if not state:  # it had no gradient yet
                self._state_view(0, i).copy_(self._params[i])
        elif "step" in state:
            rows[:, 0] = torch.as_tensor(state["step"]).to(rows)

    def _counter(self, i: int, which: int) -> Tensor:
        return self._counters[self._first_chunk[i], which]

    def _state_view(self, slot: int, i: int) -> Tensor:
        """The state of parameter i with the parameter's shape and memory layout."""
        buffer, p = self._states[slot], self._params[i]
        assert buffer is not None
        return buffer.as_strided(p.shape, p.stride(), self._first_chunk[i] * CHUNK)

    def _launches_for(self, present: tuple[bool, ...]) -> list["_Launch"]:
        """Splits the parameters that have a gradient into launches of at most _MAX_TENSORS tensors."""
        active = [i for i, p in enumerate(self._params) if present[i] and p.numel()]
        launches = []
        for begin in range(0, len(active), _MAX_TENSORS):
            tensors = tuple(active[begin : begin + _MAX_TENSORS])
            first_programs, programs = [], 0
            for i in tensors:
                first_programs.append(programs)
                programs += self._first_chunk[i + 1] - self._first_chunk[i]
            sizes = tuple(self._params[i].numel() for i in tensors)
            chunks = tuple(self._first_chunk[i] for i in tensors)
            launches.append(_Launch(tensors, sizes, tuple(first_programs), chunks, programs))
        return launches

    def _push(self, group: "_Group") -> None:
        """Writes changed hyperparameters to the device, by fills: they carry their value in the launch."""
        check_options(self.kind, group)
        if self.kind == "sgd" and (group["momentum"] > 0) != self._momentum:
            raise ValueError(f"sgd was built {'with' if self._momentum else 'without'} momentum; build a new optimizer")
        beta1, beta2 = beta1_of(group), group["betas"][1] if "betas" in group else 0.0
        logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
        rest = [float(group.get(key, 0.0)) for key in ("eps", "weight_decay")]
        average = [float(group.get(key, 0.0)) for key in ("warmup_steps", "r", "weight_lr_power")]
        values = [float(group["lr"]), beta1, beta2, *rest, *logs, *average]
        for i, value in enumerate(values):
            if value != self._pushed[i]:
                self._hyper[i].fill_(value)
                self._pushed[i] = value


def from_torch(optimizer: torch.optim.Optimizer) -> FusedOptimizer | None:
    """The fused optimizer with the parameters, options and state of a library's, or None if there is no such.

    Taken are those that `kernels.optim.kind_of` knows, over float32 parameters of one device with one set of options.
    """
    kind = kind_of(optimizer)
    if kind is None:
        return None
    groups = optimizer.param_groups
    options = [{key: group[key] for key in KINDS[kind]} for group in groups]
    modes = [{key: group.get(key) for key in ("train_mode", "k", "decoupled_weight_decay")} for group in groups]
    if any(other != options[0] for other in options) or any(other != modes[0] for other in modes):
        return None
    params = [p for group in groups for p in group["params"]]
    try:
        fused = FusedOptimizer(params, kind, **options[0])
    except ValueError:
        return None
    if optimizer.state or modes[0]["k"]:
        fused.load_state_dict(optimizer.state_dict())
    elif kind in SCHEDULE_FREE:
        fused.param_groups[0]["train_mode"] = modes[0]["train_mode"]
    return fused


def _count_step(rows: Tensor, hyper: Tensor, kind: str) -> None:
    """Moves the counters [chunks, COUNTERS] of a tensor on by a schedule-free step in which it has no gradient, as
    the kernel does those of the others. Nothing waits for the device."""
    steps, weight_sum, lr_max = rows[:, 0], rows[:, 1], rows[:, 2]
    warmup = hyper[7]
    rate = hyper[0] * torch.where(steps < warmup, (steps + 1) / warmup.clamp_min(1), 1.0)
    if kind == "adamw_sf":
        rate *= (1 - hyper[2] ** (steps + 1)).sqrt()
    lr_max.copy_(torch.maximum(rate, lr_max))
    weight_sum += (steps + 1) ** hyper[8] * lr_max ** hyper[9]
    steps += 1


def _plain(value: Any) -> Any:
    """Python numbers for tensor options."""
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, Tensor) else value


class _Launch(NamedTuple):
    """One kernel launch: the parameters' indices, and the kernel's three tables."""

    tensors: tuple[int, ...]
    sizes: tuple[int, ...]
    first_programs: tuple[int, ...]
    first_chunks: tuple[int, ...]
    programs: int


class _Group(UserDict[str, Any]):
    """A parameter group whose changes reach the device; a change that is refused is undone."""

    def __init__(self, settings: dict[str, Any], params: list[Tensor], push: Callable[["_Group"], None]) -> None:
        self._push: Callable[[_Group], None] | None = None
        super().__init__(settings)
        self["params"] = params
        self._push = push

    def __setitem__(self, key: str, value: Any) -> None:
        before = self.data.get(key)
        super().__setitem__(key, value)
        if self._push is not None:
            try:
                self._push(self)
            except ValueError:
                super().__setitem__(key, before)
                raise
