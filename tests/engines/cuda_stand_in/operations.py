"""Makes tensors of the CPU pass for tensors of the device, and sees every aten operation on them.

Two modes do it: one hears functions as Python calls them (a `device=` that is asked for, `.to`, `.device`, `.tolist`),
the other the aten operations that come of it, those of a backward pass included.
"""

from collections.abc import Callable
from typing import Any

import torch
from cuda_stand_in.device import Device
from cuda_stand_in.memory import Block
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Functions", "Operations"]

aten: Any = torch.ops.aten
_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
_COPIES = {aten.copy_.default, aten._to_copy.default}
# What gives the host a value, or a shape that depends on one.
_READ_BY_HOST = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.masked_select.default,
}
# Their results are written by whoever writes to them first.
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# They look at an argument's shape only.
_SHAPE_ONLY = {f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn")} | {
    f"new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")
}
# Arguments that are written although their schema doesn't say so, in training.
_HIDDEN_WRITES = {"native_batch_norm": (3, 4, 5), "cudnn_batch_norm": (3, 4, 5)}


class Operations(TorchDispatchMode):
    """Every aten operation: where its results lie, what it accesses, and whether it is done or captured.

    Attributes:
        to_device: the operation under way moves its input, or makes a tensor, on the device.
        to_host: it brings a tensor to the host.
    """

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.to_device = self.to_host = False
        self._plans: dict[Any, _Plan] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = _Plan(func)
        block_of = self.device.memory.block_of
        reads, writes, others = plan.accesses(args, kwargs, block_of)
        tensors = [*reads, *writes, *others]
        on_device = any(block is not None and block.is_device for _, block in tensors)
        on_device = on_device or (self.to_device and (func in _COPIES or not tensors))
        if not on_device:
            if any(block is not None for _, block in tensors):
                self._by_host(plan.name, reads, writes)
            return func(*args, **kwargs)
        with self.device.lock:
            return self._on_device(func, plan, args, kwargs, (reads, writes, others))

    def _by_host(self, name: str, reads: Any, writes: Any) -> None:
        with self.device.lock:
            for found, write in ((reads, False), (writes, True)):
                for _, block in found:
                    if block is not None:
                        self.device.host_accesses(block, name, write=write)

    def _on_device(self, func: Any, plan: "_Plan", args: Any, kwargs: Any, found: Any) -> Any:
        device, memory = self.device, self.device.memory
        device.operations += 1
        reads, writes, _ = found
        stream = device.current
        is_copy = func in _COPIES
        if not is_copy:
            _require_one_device(plan.name, found)
        elif stream.capture is not None and any(block is None and t.dim() for t, block in [*reads, *writes]):
            stream.capture.broken = True
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture unless pinned")
        capture = stream.capture
        if capture is not None:
            for _, block in writes:
                capture.keep(block)
        result = func(*args, **kwargs)
        made: list[tuple[Tensor, Block]] = []
        if not self.to_host:
            result = _map(result, lambda t: self._placed(t, plan, made))
        read_blocks = [block for _, block in reads if block is not None]
        write_blocks = [block for _, block in writes if block is not None]
        if plan.name not in _EMPTY:
            write_blocks += [block for _, block in made]
        if capture is None:
            device.begin(stream)
            for block in read_blocks:
                device.order.read(stream.agent, block.accesses, plan.name)
            for block in write_blocks:
                device.order.write(stream.agent, block.accesses, plan.name)
            stream.agent.time += 1
        elif read_blocks or write_blocks:
            again = _Again(func, args, kwargs, [t for t, _ in made], memory)
            capture.add(stream, again, plan.name, read_blocks, write_blocks)
        if func in _READ_BY_HOST or self.to_host or (is_copy and _waits(func, args, kwargs, reads, writes)):
            device.read_by_host(f"read of a value ({plan.name})")
        return result

    def _placed(self, t: Tensor, plan: "_Plan", made: list[tuple[Tensor, Block]]) -> Tensor:
        """The same result in a block of the device."""
        memory = self.device.memory
        if memory.block_of(t) is not None:
            return t  # a view, or written in place
        home = self.device.home()
        placed, block = memory.empty(t.size(), t.stride(), t.dtype, home)
        capture = self.device.current.capture
        if capture is not None:
            capture.made(block)
        if plan.name in _EMPTY:
            memory.spoil(block)
        else:
            placed.copy_(t)
        made.append((placed, block))
        return placed


class _Plan:
    """Which arguments of an operation are read, and which written."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name = schema.name.removeprefix("aten::")
        self._kinds: list[tuple[str, str]] = []
        for argument in schema.arguments:
            alias = argument.alias_info
            kind = "read" if alias is None else "write" if alias.is_write else "view"
            if self.name in _SHAPE_ONLY:
                kind = "view"
            self._kinds.append((argument.name, kind))

    def accesses(self, args: Any, kwargs: Any, block_of: Callable[[Tensor], Block | None]) -> tuple[Any, Any, Any]:
        """(read, written, neither), each a list of (tensor, its block)."""
        found: dict[str, list[Any]] = {"read": [], "write": [], "view": []}
        for i, (name, kind) in enumerate(self._kinds):
            value = args[i] if i < len(args) else kwargs.get(name)
            if isinstance(value, Tensor):
                found[kind].append((value, block_of(value)))
            elif isinstance(value, list | tuple):
                found[kind] += [(t, block_of(t)) for t in value if isinstance(t, Tensor)]
        hidden = _HIDDEN_WRITES.get(self.name)
        if hidden is not None and args[hidden[-1]]:
            stats = [args[i] for i in hidden[:-1] if args[i] is not None]
            found["write"] += [(t, block_of(t)) for t in stats]
        return found["read"], found["write"], found["view"]


class _Again:
    """An operation that can be done again with the same addresses."""

    def __init__(self, func: Any, args: Any, kwargs: Any, results: list[Tensor], memory: Any) -> None:
        def fixed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return memory.by_address(value) if memory.block_of(value) is not None else value.clone()
            if isinstance(value, list | tuple):
                return type(value)(fixed(one) for one in value)
            return value

        self._func, self._args = func, fixed(tuple(args))
        self._kwargs = {key: fixed(value) for key, value in kwargs.items()}
        self._results = [fixed(t) for t in results]

    def __call__(self) -> None:
        result = self._func(*self._args, **self._kwargs)
        if self._results:
            found: list[Tensor] = []
            _map(result, found.append)
            for place, value in zip(self._results, found, strict=True):
                place.copy_(value)


class Functions(TorchFunctionMode):
    """What Python asks of tensors and devices, before it becomes an operation."""

    def __init__(self, device: Device, operations: Operations) -> None:
        super().__init__()
        self.device, self._operations = device, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, args, kwargs)
        if kwargs.get("pin_memory"):
            return self._pinned(func, args, {**kwargs, "pin_memory": False})
        if "device" in kwargs and _is_cuda(kwargs["device"]) and func is not torch._C._nn._parse_to:
            return self._on_device(func, args, {**kwargs, "device": _CPU})
        return func(*args, **kwargs)

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        operations = self._operations
        operations.to_device = True
        try:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor) and self.device.memory.block_of(result) is None:
                result = result.to(_CPU, copy=True)  # made beside the dispatcher, as torch.tensor does
            return result
        finally:
            operations.to_device = False

    def _pinned(self, func: Any, args: Any, kwargs: Any) -> Any:
        plain = func(*args, **kwargs)
        return self.device.memory.empty(plain.size(), plain.stride(), plain.dtype, None)[0].copy_(plain)

    def get_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        block = self.device.memory.block_of(args[0])
        return _CUDA if block is not None and block.is_device else func(*args, **kwargs)

    def get_is_cuda(self, func: Any, args: Any, kwargs: Any) -> bool:
        block = self.device.memory.block_of(args[0])
        return block is not None and block.is_device

    def get_is_cpu(self, func: Any, args: Any, kwargs: Any) -> bool:
        return not self.get_is_cuda(func, args, kwargs)

    def is_pinned(self, func: Any, args: Any, kwargs: Any) -> bool:
        block = self.device.memory.block_of(args[0])
        return block is not None and not block.is_device

    def to(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        target = None
        if rest and isinstance(rest[0], Tensor):
            kwargs = {"dtype": rest[0].dtype, **kwargs}
            target = self.get_device(torch.Tensor.device.__get__, (rest[0],), {})  # type: ignore[attr-defined]
            rest = rest[1:]
        elif rest and isinstance(rest[0], torch.device | str | int):
            target = torch.device(rest.pop(0))
        elif "device" in kwargs:
            kwargs = dict(kwargs)
            target = kwargs.pop("device")
            target = None if target is None else torch.device(target)
        if target is None and func is not torch.Tensor.cpu and func is not torch.Tensor.cuda:
            return func(tensor, *rest, **kwargs)
        return self._moved(tensor, target, rest, kwargs)

    def cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._moved(args[0], torch.device("cpu"), [], {})

    def cuda(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._moved(args[0], _CUDA, [], {"non_blocking": kwargs.get("non_blocking", False)})

    def tolist(self, func: Any, args: Any, kwargs: Any) -> Any:
        block = self.device.memory.block_of(args[0])
        if block is not None:
            with self.device.lock:
                if block.is_device:
                    stream = self.device.current
                    self.device.order.read(stream.agent, block.accesses, "tolist")
                    self.device.read_by_host("read of a value (tolist)")
                else:
                    self.device.host_accesses(block, "tolist", write=False)
        return func(*args, **kwargs)

    def numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        block = self.device.memory.block_of(args[0])
        if block is not None and block.is_device:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.tolist(func, args, kwargs) if block is not None else func(*args, **kwargs)

    def _moved(self, tensor: Tensor, target: torch.device, rest: list[Any], kwargs: Any) -> Any:
        operations = self._operations
        block = self.device.memory.block_of(tensor)
        is_there = block is not None and block.is_device
        if (target.type == "cuda") == is_there:
            return torch.Tensor.to(tensor, _CPU, *rest, **kwargs)
        name = "to_host" if is_there else "to_device"
        setattr(operations, name, True)
        try:
            return torch.Tensor.to(tensor, _CPU, *rest, **{**kwargs, "copy": True})
        finally:
            setattr(operations, name, False)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.Tensor.device.__get__: Functions.get_device,  # type: ignore[attr-defined]
    torch.Tensor.is_cuda.__get__: Functions.get_is_cuda,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: Functions.get_is_cpu,  # type: ignore[attr-defined]
    torch.Tensor.is_pinned: Functions.is_pinned,
    torch.Tensor.to: Functions.to,
    torch.Tensor.cpu: Functions.cpu,
    torch.Tensor.cuda: Functions.cuda,
    torch.Tensor.tolist: Functions.tolist,
    torch.Tensor.numpy: Functions.numpy,
}


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


def _require_one_device(name: str, found: Any) -> None:
    for tensor, block in [one for group in found for one in group]:
        if tensor.dim() and (block is None or not block.is_device):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")


def _waits(func: Any, args: Any, kwargs: Any, reads: Any, writes: Any) -> bool:
    """Whether a copy keeps the host waiting: one to the host does, but into page-locked memory where it need not."""
    if func is not aten.copy_.default:
        return False
    _, target = writes[0]
    non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
    return target is None or (not target.is_device and not non_blocking)


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_map(one, change) for one in value)
    return value
