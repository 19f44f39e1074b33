"""Counts allocations to the byte: the most at once and at the end, and what of it stays from step to step."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from unlocked.workers.actions import Item
from unlocked.workers.stage import Stage

__all__ = ["Count", "StepMemory", "bytes_of", "count_allocations", "count_steps", "persistent_tensors"]

_CUDA_BLOCK: Final = 512  # bytes to which torch's CUDA allocator rounds up


@dataclass(slots=True)
class Count:
    peak: int = 0
    now: int = 0


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of training steps on one stage, from `count_steps`."""

    activation_bytes: int
    """The most at once, without what persists: activations and the intermediate results of a step."""
    persistent_bytes: int
    """Weights, optimizer states, buffers, the batch; under a local rule the weights' gradients too."""
    held_bytes: int
    """What is left of activations after the last step."""


def count_steps(
    stage: Stage, x: Tensor, labels: Tensor, *, steps: int, end_to_end: bool, chunks: int = 1
) -> StepMemory:
    """Trains `steps` times on one micro-batch, and counts.

    Args:
        end_to_end: the stage is one layer that trains by backpropagation, whose gradients are made anew at every step.
        chunks: into which the micro-batch is cut, end to end: their gradients are added up before the update.
    """
    device = x.device
    built = bytes_of(persistent_tensors(stage, x, labels), device)
    with count_allocations(device) as counted:
        item = Item(0, "train", 0, 0, len(labels), False)
        for _ in range(steps):
            if chunks > 1:
                _accumulate(stage, x, labels, chunks)
            else:
                stage.forward(item, x, labels)
                stage.update(item)
            if end_to_end:
                # Backpropagation makes all gradients anew while activations go: none needs to be there at its peak.
                stage.layers[0].optimizer.zero_grad(set_to_none=True)
        persistent = bytes_of(persistent_tensors(stage, x, labels), device)
    grown = persistent - built
    return StepMemory(
        activation_bytes=counted.peak - grown, persistent_bytes=persistent, held_bytes=counted.now - grown
    )


def _accumulate(stage: Stage, x: Tensor, labels: Tensor, chunks: int) -> None:
    """One update by the mean gradient of the chunks: the plain loop that everybody writes."""
    (layer,) = stage.layers
    layer.set_mode("train")
    for part, wanted in zip(x.chunk(chunks), labels.chunk(chunks), strict=True):
        loss = layer.rule(layer.block(part), wanted) * (len(wanted) / len(labels))
        loss.backward()
    layer.optimizer.step()


@contextlib.contextmanager
def count_allocations(device: torch.device) -> Iterator[Count]:
    """Bytes allocated inside: the most at once, and at the end."""
    count = Count()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield count
        torch.cuda.synchronize(device)
        count.peak = torch.cuda.max_memory_allocated(device) - before
        count.now = torch.cuda.memory_allocated(device) - before
        return
    gc.collect()  # what an earlier chain left in cycles would be freed inside
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        yield count
    finally:
        with _silent_stderr():
            profiler.stop()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events: list[Any] = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        count.now += event.nbytes()
        count.peak = max(count.peak, count.now)


def bytes_of(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Of all storages, each once; a scalar that an optimizer keeps on the CPU does not count on a GPU."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device == device}
    if device.type == "cuda":
        return sum(-(-size // _CUDA_BLOCK) * _CUDA_BLOCK for size in storages.values())
    return sum(storages.values())


def persistent_tensors(stage: Stage, x: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Everything that a run keeps from its first step to its last."""
    yield from (x, labels)
    for layer in stage.layers:
        for module in (layer.block, layer.rule):
            yield from module.buffers()
            for parameter in module.parameters():
                yield parameter
                if parameter.grad is not None:
                    yield parameter.grad
        # Sums and counts of the layer, and constants of its closed-form step.
        yield from (value for holder in (layer, layer.step) for value in _own_tensors(holder))
        if layer.optimizer is not None:
            for state in layer.optimizer.state_dict()["state"].values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _own_tensors(holder: object) -> Iterator[Tensor]:
    constants = ("totals", "eval_totals", "clock", "_counted", "_zero")
    for owner in (holder, getattr(holder, "body", None)):
        found = (getattr(owner, name, None) for name in constants)
        yield from (value for value in found if isinstance(value, Tensor))


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's native code says on the descriptor itself that it starts and stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
