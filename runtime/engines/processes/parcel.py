"""What a caller sends to the worker processes that it starts, and back: a job, with the state of the libraries.

By cloudpickle, so that lambdas, partial functions and classes of a script or a notebook come along by value; what
stands in a module is named, and imported there.
"""

import io
import pickle
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.runtime.job import Job
from unlocked.runtime.saving.generators import loader_generators

__all__ = ["global_state", "loader_states", "pack_data", "pack_job", "set_global_state", "set_loader_states", "unpack"]

_MAPPED_BYTES = 1 << 20  # tensors smaller than this are sent, even if a file holds them too


def pack_job(engine: Any, job: Job) -> bytes:
    """The engine and the job without its data, which only stage 0 reads.

    Raises:
        ValueError: a part of it can't be sent; names the part and why.
    """
    nothing: Any = None
    bare = replace(job, train=nothing, test=None)
    parts = {
        "the network": job.network,
        "the rule": job.rule,
        "the optimizer": job.optimizer,
        "the learning-rate schedule": job.lr_factor,
    }
    return _pack((engine, bare, global_state()), parts)


def pack_data(job: Job) -> bytes:
    """The training and the evaluation data, for rank 0.

    Raises:
        ValueError: data that can't be sent, such as a generator; says which.
    """
    return _pack((job.train, job.test), {"the training data": job.train, "the evaluation data": job.test})


def unpack(data: bytes) -> Any:
    """What `pack_job` or `pack_data` has packed.

    Raises:
        ValueError: a module that it names is not to be found here, or fails.
    """
    try:
        return pickle.loads(data)
    except Exception as error:  # whatever a user's module does when it is imported
        raise ValueError(
            f"a worker process can't load what it was sent ({type(error).__name__}: {first_line(error)}); put the "
            "classes and functions that network, rule, optimizer and data need into the script or notebook itself, or "
            "into a module that Python finds from any folder"
        ) from error


def global_state() -> dict[str, Any]:
    """What decides about numbers and is neither an argument nor a module's: the generators, and torch's switches."""
    return {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "matmul": torch.get_float32_matmul_precision(),
    }


def set_global_state(state: Mapping[str, Any], *, switches: bool = True) -> None:
    """The inverse of `global_state`. switches: False: the generators alone."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    if switches:
        torch.set_default_dtype(state["dtype"])
        enabled, warn_only = state["deterministic"]
        if enabled:  # the setter imports torch's compiler, which takes seconds; a process begins with False
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
        torch.set_float32_matmul_precision(state["matmul"])


def loader_states(job: Job) -> list[Tensor]:
    """Where the generators of the data's loaders stand, which choose the order of a shuffling DataLoader."""
    return [generator.get_state() for generator in loader_generators(job.train, job.test)]


def set_loader_states(job: Job, states: list[Tensor]) -> None:
    """Puts the caller's loaders where those of rank 0 ended: the next run goes on as it would in one process."""
    for generator, state in zip(loader_generators(job.train, job.test), states, strict=True):
        generator.set_state(state)


def _pack(content: Any, parts: Mapping[str, Any]) -> bytes:
    try:
        return _dumps(content)
    except Exception as error:
        for name, part in parts.items():
            try:
                _dumps(part)
            except Exception as reason:
                raise ValueError(_unsendable(name, part, reason)) from reason
        raise ValueError(_unsendable("the run", content, error)) from error


def _unsendable(name: str, part: Any, reason: Exception) -> str:
    content = getattr(part, "loader", part)
    kind = type(content).__name__
    if type(content).__module__.startswith("unlocked.data"):
        kind = "an iterator"  # which is kept in a class of ours, together with the batch that was looked at
    return (
        f"{name} ({kind}) can't be sent to the worker processes: {first_line(reason)}; leave out of it what lives in "
        "one process alone (open files, locks, generators, connections), or use engine 'streams' or 'sequential', "
        "which run in this process"
    )


def _dumps(content: Any) -> bytes:
    with io.BytesIO() as buffer:
        _Pickler(buffer, protocol=5).dump(content)
        return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, but large tensors that lie in a mapped file are named and not copied."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and (place := _mapped(obj)) is not None:
            return _open_mapped, (*place, obj.dtype, tuple(obj.shape))
        return super().reducer_override(obj)


def _mapped(tensor: Tensor) -> tuple[str, int] | None:
    """The file and the offset where the tensor's bytes lie, if it is a shared mapping of one (Linux alone can tell)."""
    large = tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes >= _MAPPED_BYTES
    if not large or tensor.requires_grad or tensor.layout != torch.strided:
        return None
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    for line in lines:  # proc(5): address, permissions, offset, device, inode, path
        fields = line.split(maxsplit=5)
        low, _, high = fields[0].partition("-")
        if int(low, 16) <= first and end <= int(high, 16) and fields[1].endswith("s") and len(fields) == 6:
            offset = int(fields[2], 16) + first - int(low, 16)
            path = Path(fields[5])
            inode = path.stat().st_ino if path.is_file() else 0
            return (str(path), offset) if inode == int(fields[4]) else None
    return None


def _open_mapped(path: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    array = np.memmap(path, dtype=np.uint8, mode="c", offset=offset, shape=(int(np.prod(shape)) * dtype.itemsize,))
    return torch.from_numpy(array).view(dtype).view(shape)
