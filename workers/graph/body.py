"""A block's step as a list of calls: forward to the next layer's input, and from the latents' gradient back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from unlocked.kernels.reference import Layout, pool_latents, spread_latents
from unlocked.workers.graph.operations import Casts, Convolution, Gradients, Operation
from unlocked.workers.graph.tracing import Node

__all__ = ["Call", "End", "GraphBody", "How", "PlainEnd"]

How = Literal["closed", "joined", "autograd"]


@dataclass(eq=False)
class Call:
    """One call of a step."""

    operation: Operation
    inputs: Sequence[Node]
    outputs: Sequence[Node]
    covers: Sequence[Node]
    """The operations of the block that it is made of, in order."""
    how: How
    why: str = ""
    """What was joined; or why autograd."""


class End(Protocol):
    """The last call of a block: it gives the next layer's input and the latents, and is where gradients begin."""

    parameters: Sequence[nn.Parameter]
    counts: Sequence[nn.Module]

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What the next layer reads: in `out` if given."""
        ...

    def latents(self) -> Tensor:
        """What the local head sees of the last `forward`: [B, D]."""
        ...

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        """As `Operation.backward`, from the gradient of the latents."""
        ...


class PlainEnd(Operation):
    """Latents of any activations, by the library; the block's tail makes the next layer's input of them.

    Args:
        latent_size: p; None: the activations [B, N] are class scores, and their own latents.
        leaving: puts the output into the type that the next layer reads.
    """

    def __init__(
        self,
        tail: nn.Module,
        latent_size: int | None,
        layout: Layout | None,
        casts: Casts,
        leaving: Callable[[Tensor], Tensor],
    ) -> None:
        self._tail, self._side, self._layout, self._casts, self._leaving = tail, latent_size, layout, casts, leaving
        self._activations: Tensor | None = None

    def forward(self, activations: Tensor, out: Tensor | None = None) -> Tensor:
        """The block's output, after its dropout too."""
        self._activations = activations
        with self._casts.autocast():
            result = self._tail(activations)
        result = self._leaving(result)
        return result if out is None else out.copy_(result)

    def latents(self) -> Tensor:
        """[B, D]; class scores as float32."""
        assert self._activations is not None
        if self._side is not None:
            return pool_latents(self._activations, self._side, self._layout)
        return self._activations.float() if self._activations.dtype == torch.bfloat16 else self._activations

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        activations, self._activations = self._activations, None
        assert activations is not None
        grad = grad.to(activations.dtype)
        if self._side is None:
            return [grad], []
        return [spread_latents(grad, activations, self._side, self._layout)], []


class GraphBody:
    """One block's arithmetic: a `forward`, then one `latents` and one `backward`, which drops what was kept.

    Args:
        source: the body's input.
        calls: in order; the last one's operation is the block's `End`.
        trained: the block's parameters that train, in their order.
        dropout: of the block's tail, where `end` leaves it out.
    """

    def __init__(
        self,
        source: Node,
        calls: Sequence[Call],
        *,
        trained: Iterable[nn.Parameter],
        casts: Casts,
        dropout: nn.Module | None = None,
    ) -> None:
        *self.calls, ending = calls
        self.end, self.casts = cast(End, ending.operation), casts
        (last,) = ending.inputs
        self._rows = [(call.how, tuple(node.name for node in call.covers), call.why) for call in calls]
        self._source, self._last, self._dropout = source, last, dropout
        self._places = {id(p): place for place, p in enumerate(trained)}
        self.counts: Sequence[nn.Module] = [n for call in calls for n in call.operation.counts]
        self._needs = {source: False}
        for call in self.calls:
            needs = bool(call.operation.parameters) or any(self._needs[node] for node in call.inputs)
            self._needs.update(dict.fromkeys(call.outputs, needs))
        self._spent = _last_uses(self.calls, last)
        self._types: dict[Node, torch.dtype] = {}

    @property
    def reached(self) -> set[int]:
        """Ids of the parameters that the loss depends on."""
        found = {id(p) for p in self.end.parameters}
        wanted = {self._last}
        for call in reversed(self.calls):
            if any(node in wanted for node in call.outputs):
                found |= {id(p) for p in call.operation.parameters}
                wanted |= set(call.inputs)
        return found

    @property
    def rows(self) -> list[tuple[How, tuple[str, ...], str]]:
        """For every call: how it runs, the operations that it is made of, and why."""
        return self._rows

    @contextmanager
    def by_library(self) -> Iterator[None]:
        """Inside, all convolutions are the library's, whose operations can be counted."""
        kept = [(op, op.backend) for op in (call.operation for call in self.calls) if isinstance(op, Convolution)]
        for operation, _ in kept:
            operation.backend = None
        try:
            yield
        finally:
            for operation, backend in kept:
                operation.backend = backend

    @property
    def gives_every_gradient(self) -> bool:
        """Every step brings one for every parameter: nothing but a module of the user's may leave one out."""
        return not any(call.operation.may_skip for call in self.calls)

    def forward(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The next layer's input; in `out`, if given: its shape and dtype, any strides."""
        values: dict[Node, Any] = {self._source: x}
        for call, spent in zip(self.calls, self._spent, strict=True):
            made = call.operation.forward(*[values[node] for node in call.inputs])
            for node in spent:
                values.pop(node, None)
            values.update(zip(call.outputs, made if len(call.outputs) > 1 else (made,), strict=True))
            if self.casts.half:
                self._note_types(values, call.outputs)
        last = values.pop(self._last)
        if not isinstance(self.end, PlainEnd):  # that one says itself what leaves in which type
            last = self.casts.value(last)
        if self._dropout is None:
            return self.end.forward(last, out)
        result: Tensor = self._dropout(self.end.forward(last))
        return result if out is None else out.copy_(result)

    def latents(self) -> Tensor:
        """What the local head sees of the last `forward`: [B, D]."""
        return self.end.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor | None]:
        """The gradients of the block's parameters, in their order and shapes, from that of the latents [B, D]; None:
        nothing came back to it."""
        found: list[Tensor | None] = [None] * len(self._places)
        grads: dict[Node, Tensor] = {}
        self._take(self.end, [self._last], latents_grad, found, grads)
        for call in reversed(self.calls):
            given = [grads.pop(node, None) for node in call.outputs]
            if self._types:
                given = [g if g is None else g.to(self._types[n]) for n, g in zip(call.outputs, given, strict=True)]
            if any(grad is not None for grad in given) and self._needs[call.outputs[0]]:
                self._take(call.operation, call.inputs, given if len(given) > 1 else given[0], found, grads)
        return found

    def _take(
        self,
        operation: Operation | End,
        inputs: Sequence[Node],
        grad: Any,
        found: list[Tensor | None],
        grads: dict[Node, Tensor],
    ) -> None:
        wanted = [self._needs[node] for node in inputs]
        of_inputs, of_parameters = operation.backward(grad, wanted)
        for parameter, one in zip(operation.parameters, of_parameters, strict=True):
            place, before = self._places[id(parameter)], found[self._places[id(parameter)]]
            found[place] = one if before is None or one is None else before + one
        for node, is_wanted, one in zip(inputs, wanted, of_inputs, strict=True):
            if is_wanted and one is not None:
                grads[node] = grads[node] + one if node in grads else one

    def _note_types(self, values: dict[Node, Any], nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(values[node], Tensor):
                self._types[node] = values[node].dtype


def _last_uses(calls: Sequence[Call], last: Node) -> list[list[Node]]:
    """After each call, the values that no later one reads."""
    seen, spent = {last}, []
    for call in reversed(calls):
        done = [node for node in call.inputs if node not in seen]
        seen.update(done)
        spent.append(done)
    return spent[::-1]
