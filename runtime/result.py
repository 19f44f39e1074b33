"""What a run leaves: figures per epoch, the final weights, and their digest."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlocked.runtime.metrics.records import EpochResult

__all__ = ["RunResult", "pack_tensors", "tensor_bytes", "unpack_tensors", "weights_digest"]


@dataclass(slots=True, kw_only=True)
class RunResult:
    """The outcome of `Trainer.fit`. Under `torchrun` only rank 0 holds figures and weights of all stages."""

    engine: str
    stages: list[list[str]]
    """The layer names of each stage."""
    epochs: list[EpochResult] = field(default_factory=list)
    """Those that ended here; after a resume they begin with the epoch in which it went on."""
    epochs_done: int = 0
    """Over the whole run, including the part before a resume."""
    steps: int = 0
    """Training micro-batches done, over the whole run including the part before a resume."""
    first_step: int = 0
    """Training micro-batches that were done before a resume: the others were trained here, in `train_seconds`."""
    train_seconds: float = 0.0
    setup_seconds: float = 0.0
    images_per_second: float = 0.0
    """Training images over `train_seconds`, in which evaluation counts as well."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Every parameter and buffer by layer and name, on the CPU."""
    weights_sha256: str = ""
    peak_memory_bytes: list[int] = field(default_factory=list)
    busy_fraction: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    """Intra-op threads of each stage's process. On a CPU, equal bits need equal numbers of them."""
    stopped_by: int | None = None
    """The signal number of an orderly stop, or None."""
    predicted_stage_seconds: list[float] = field(default_factory=list)
    """Of a training micro-batch, from timing each layer alone before the stages were cut; empty for one stage."""
    measured_stage_seconds: list[float] = field(default_factory=list)
    """Of a training micro-batch, on average: forward and update, without waiting for neighbours; empty where only the
    device knows (`streams`)."""

    @property
    def is_complete(self) -> bool:
        """This process knows the whole run (under torchrun: rank 0)."""
        return bool(self.weights_sha256)

    def figures(self) -> dict[str, Any]:
        """The run in a few numbers, for logs."""
        return {
            "epochs": self.epochs_done,
            "steps": self.steps,
            "first_step": self.first_step,
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second,
            "test_acc1": self.test_acc1,
            "test_loss": self.test_loss,
            "weights_sha256": self.weights_sha256,
            "threads": self.threads,
            "predicted_stage_seconds": self.predicted_stage_seconds,
            "measured_stage_seconds": self.measured_stage_seconds,
            "stopped_by": self.stopped_by,
        }

    @property
    def test_acc1(self) -> float | None:
        """Percent, after the last evaluated epoch."""
        return next((e.eval_acc1 for e in reversed(self.epochs) if e.eval_acc1 is not None), None)

    @property
    def test_loss(self) -> float | None:
        return next((e.eval_loss for e in reversed(self.epochs) if e.eval_loss is not None), None)

    @property
    def layer_acc1(self) -> dict[str, float]:
        """Percent, of every layer that makes a prediction of its own, after the last evaluated epoch."""
        return next((dict(e.layer_acc1) for e in reversed(self.epochs) if e.layer_acc1), {})

    @property
    def local_losses(self) -> dict[str, float]:
        """Mean local loss per layer in the last epoch."""
        return dict(self.epochs[-1].local_losses) if self.epochs else {}


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and little-endian bytes of all parameters and buffers, in layer order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def pack_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Plain data that msgpack can carry from a stage to rank 0."""
    return [
        {"name": n, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "data": tensor_bytes(t)}
        for n, t in tensors
    ]


def unpack_tensors(packed: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """The inverse of `pack_tensors`."""
    result = {}
    for entry in packed:
        dtype = getattr(torch, entry["dtype"])
        flat = torch.frombuffer(bytearray(entry["data"]), dtype=dtype) if entry["data"] else torch.empty(0, dtype=dtype)
        result[entry["name"]] = flat.reshape(entry["shape"])
    return result


def tensor_bytes(tensor: Tensor) -> bytes:
    """The values in logical order, little-endian."""
    array = tensor.detach().cpu().contiguous()
    if array.dtype in (torch.bfloat16, torch.float16):
        array = array.view(torch.int16)
    values = array.numpy()
    return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
