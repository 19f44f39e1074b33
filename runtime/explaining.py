"""What becomes of a network's layers: which operations run in closed form, together, or through autograd, and why."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from unlocked.kernels.trial import copy_rate, product_rate
from unlocked.runtime.costs import Trial, trials
from unlocked.runtime.job import Job
from unlocked.workers.fused import FusedStep
from unlocked.workers.graph.body import GraphBody, How
from unlocked.workers.layer import Layer
from unlocked.workers.open_step import OpenStep
from unlocked.workers.pass_layer import OpenPassStep

__all__ = ["ExplainedCall", "ExplainedLayer", "Explanation", "explain"]


@dataclass(frozen=True, slots=True)
class ExplainedCall:
    """Operations of a block that run as one call."""

    how: How
    """closed: by the table's forms; joined: several in one kernel or pass; autograd: left to torch."""
    operations: tuple[str, ...]
    """By their place in the block; `latents` and `tail` stand for what a block ends in."""
    why: str
    """Of autograd: what stands against a closed form. Of joined: what is joined. Of closed: what is of our own."""


@dataclass(frozen=True, slots=True)
class ExplainedLayer:
    """One layer's local step on a micro-batch."""

    name: str
    calls: tuple[ExplainedCall, ...]
    saved_bytes: int
    """What the layer keeps from its forward to its update, its input included."""
    flops: int
    """Of products and convolutions, in forward and update; of these the direct sums', however they are computed."""
    moved_bytes: int
    """That must move: input, output and what is kept, each written once and read once; weights read, and read and
    written by the optimizer with its state."""
    floor_seconds: float
    """The longer of `flops` at the rate of a matrix product and `moved_bytes` at that of a copy, both measured here."""
    seconds: float
    """Measured: the median of five steps."""

    @property
    def is_closed(self) -> bool:
        """Nothing of it runs through autograd."""
        return all(call.how != "autograd" for call in self.calls)


@dataclass(frozen=True, slots=True)
class Explanation:
    """All layers, in order. As text, a table."""

    layers: tuple[ExplainedLayer, ...]
    batch_size: int
    device: str
    kernels: str
    precision: str

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        lines = [f"micro-batches of {self.batch_size} on {self.device}, {self.precision}, kernels {self.kernels}"]
        for layer in self.layers:
            floor, measured = 1e3 * layer.floor_seconds, 1e3 * layer.seconds
            lines.append(
                f"{layer.name}: {_megabytes(layer.saved_bytes)} kept, {layer.flops / 1e9:.2f} GFLOP, floor {floor:.2f} "
                f"ms, measured {measured:.2f} ms"
            )
            for call in layer.calls:
                why = f": {call.why}" if call.why else ""
                lines.append(f"    {call.how:<9}{', '.join(call.operations)}{why}")
        return "\n".join(lines)


def explain(job: Job, batch_size: int) -> Explanation:
    """Runs a few steps of every layer on made-up samples; weights are put back afterwards.

    Raises:
        RuntimeError: a layer or its rule fails; names the layer.
    """
    device, settings = job.device, job.settings
    layers = trials(_explained, lambda i: job.layer(i, device), job.network, batch_size=batch_size, device=device)
    return Explanation(tuple(layers), batch_size, settings.device, settings.kernels, settings.precision)


def _explained(trial: Trial) -> ExplainedLayer:
    layer, x = trial.layer, trial.x
    kept: dict[int, int] = {}
    owned = {_place(t) for t in [*layer.block.parameters(), *layer.block.buffers(), *layer.rule.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in owned:
            kept[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    trial.seconds()  # what is done once, such as the optimizer's state
    body = getattr(layer.step, "body", None)
    by_library = body.by_library() if isinstance(body, GraphBody) else nullcontext()
    with _Flops() as counter, by_library:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            trial.forward()
        for tensor in _held(layer.step):
            keep(tensor)
        trial.update()
    flops, saved = counter.total, sum(kept.values())
    weights = sum(p.numel() * p.element_size() for p in layer.parameters)
    moved = x.nbytes + trial.output.nbytes + 2 * saved + 8 * weights  # forward's; p, g, m, v read; p, m, v written
    dtype = torch.bfloat16 if layer.computes_in_bfloat16 else torch.float32
    floor = max(flops / product_rate(str(x.device), dtype), moved / copy_rate(str(x.device)))
    return ExplainedLayer(layer.name, _calls(layer), saved, flops, moved, floor, trial.seconds())


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # torch counts none of its operations


class _Flops(TorchDispatchMode):
    """Adds up the floating-point operations of products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        elif func._overloadpacket is _ONEDNN:
            self.total += 2 * result.numel() * args[1].shape[1]
        return result


def _calls(layer: Layer) -> tuple[ExplainedCall, ...]:
    step = layer.step
    if isinstance(step, FusedStep | OpenStep | OpenPassStep):
        calls = [ExplainedCall(how, names, why) for how, names, why in step.body.rows]
        if not isinstance(step, FusedStep):
            calls.append(ExplainedCall("autograd", (type(layer.rule).__name__,), step.rest))
        return tuple(calls)
    parts = [f"{name} ({type(m).__name__})" for name, m in layer.block.body.named_children()]
    names = parts or [type(layer.block.body).__name__]
    return (ExplainedCall("autograd", tuple(names), getattr(step, "why", "")),)


def _held(step: Any) -> Iterator[Tensor]:
    """The tensors that a step holds, however deep, but for those of modules."""
    seen: set[int] = set()

    def walk(value: Any) -> Iterator[Tensor]:
        if id(value) in seen or isinstance(value, nn.Module | Layer | type):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for one in value:
                yield from walk(one)
        elif type(value).__module__.startswith("unlocked.workers") and hasattr(value, "__dict__"):
            for one in vars(value).values():
                yield from walk(one)

    return walk(step)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
