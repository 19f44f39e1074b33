"""Puts the stand-in where torch's CUDA interface is."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cuda_stand_in.device import Device, Event, Stream
from cuda_stand_in.graphs import Graph
from cuda_stand_in.operations import Functions, Operations
from torch.multiprocessing import reductions
from torch.utils._pytree import tree_map_only

__all__ = ["cuda_stand_in"]

_MEMORY_BYTES = 80 << 30


@contextlib.contextmanager
def cuda_stand_in(removed: Iterable[str] = (), *, strict: bool = False) -> Iterator[Device]:
    """Inside, `device="cuda"` runs on tensors of the CPU, in this thread and in those that it starts.

    Args:
        removed: waits to leave out, by names as `Device.waits` has them.
        strict: what is out of order is an `OutOfOrderError` at once, not a line in `Order.unordered`.
    """
    device = Device(removed, strict=strict)
    with contextlib.ExitStack() as stack:
        for place, names in _interface(device).items():
            for name, value in names.items():
                stack.enter_context(patch.object(place, name, value, create=True))
        stack.enter_context(_modes(device))
        yield device


@contextlib.contextmanager
def _modes(device: Device) -> Iterator[None]:
    operations = Operations(device)
    with Functions(device, operations), operations:
        yield


def _interface(device: Device) -> dict[Any, dict[str, Any]]:
    class On:
        """A class, as torch's: a generator that is never resumed selects its stream again when it is collected."""

        def __init__(self, stream: Stream | None) -> None:
            self._stream = stream

        def __enter__(self) -> None:
            self._before = device.current
            device.current = self._stream or self._before

        def __exit__(self, *_: object) -> None:
            device.current = self._before

    run = threading.Thread.run

    def run_with_modes(thread: threading.Thread) -> None:
        with _modes(device):
            run(thread)

    class BoundStream(Stream):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(device, f"stream {len(device.streams)}")

    class BoundEvent(Event):
        def __init__(self, **options: Any) -> None:
            super().__init__(device, **options)

        @classmethod
        def from_ipc_handle(cls, _: Any, handle: bytes) -> Any:
            return device.open(handle)

    class BoundGraph(Graph):
        def __init__(self, keep_graph: bool = False) -> None:
            super().__init__(device, keep_graph)

    autocast = torch.autocast

    def autocast_on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    cuda = {
        "Stream": BoundStream,
        "Event": BoundEvent,
        "CUDAGraph": BoundGraph,
        "stream": On,
        "current_stream": lambda *_: device.current,
        "default_stream": lambda *_: device.default,
        "synchronize": lambda *_: device.synchronize(),
        "device": lambda *_: contextlib.nullcontext(),
        "set_device": device.select,
        "init": lambda: None,
        "default_generators": (torch.Generator(), torch.Generator()),
        "current_device": lambda: device.selected,
        "device_count": lambda: device.count,
        "graph_pool_handle": device.new_pool,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: device.memory.used,
        "mem_get_info": lambda *_: (_MEMORY_BYTES, _MEMORY_BYTES),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(multi_processor_count=132, uuid=device.uuid),
    }

    return {
        torch.cuda: cuda,
        reductions: _sharing(device),
        torch._C: {"_host_emptyCache": lambda: None},
        torch: {"autocast": autocast_on_cpu, **_loading()},
        threading.Thread: {"run": run_with_modes},
    }


def _loading() -> dict[str, Any]:
    load = torch.load

    def load_on_device(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        """A torch without CUDA reads to the host; what was to lie on the device goes there."""
        found = load(*args, map_location="cpu", **kwargs)
        if map_location is None or torch.device(map_location).type == "cpu":
            return found
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to("cuda"), found)

    return {"load": load_on_device}


def _sharing(device: Device) -> dict[str, Any]:
    """What opens a tensor's memory to other processes."""

    def reduce_tensor(tensor: torch.Tensor) -> Any:
        """As torch's of a tensor on a GPU: the last eight are what its memory is opened by."""
        return None, (device.export(tensor), tensor.nbytes, 0, False, b"", 0, b"", False)

    def rebuild_cuda_tensor(*arguments: Any) -> torch.Tensor:
        return device.memory.by_address(device.open(arguments[7]))  # another tensor at the same place

    return {"reduce_tensor": reduce_tensor, "rebuild_cuda_tensor": rebuild_cuda_tensor}
