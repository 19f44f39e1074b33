"""A block's step as a list of calls: forward to the next layer's input, and from the latents' gradient back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from unlocked.kernels.reference import Layout, pool_latents, spread_latents
from unlocked.workers.graph.operations import Casts, Convolution, Gradients, Operation, Replaceable
from unlocked.workers.graph.products import Linear
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

    def forward(self, *inputs: Tensor, out: Tensor | None = None) -> Tensor:
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
        tail: of the activations, into which it does not write.
        latent_size: p; None: the activations [B, N] are class scores, and their own latents.
        leaving: puts the output into the type that the next layer reads.
    """

    def __init__(
        self,
        tail: Callable[[Tensor], Tensor],
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
        return self._casts.left(self._leaving(result), out)

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
        if (
            self._layout == "tokens" and self._side == 1 and activations.dim() == 3
        ):  # all tokens have the mean's: one row stands for them
            return [(grad / activations.shape[1]).unsqueeze(1).expand_as(activations)], []
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
        self._last = ending.inputs
        self._rows = [(call.how, tuple(node.name for node in call.covers), call.why) for call in calls]
        self._dropout = dropout
        self._ends_plainly = isinstance(self.end, PlainEnd)  # that one says itself what leaves in which type
        self.counts: Sequence[nn.Module] = [n for call in calls for n in call.operation.counts]
        own = (call.operation for call in calls if isinstance(call.operation, Convolution))
        self.convolves = any(operation.backend is not None for operation in own)
        """Some of its convolutions are the backend's own."""
        self.trained = list(trained)
        self._places = {id(p): place for place, p in enumerate(self.trained)}
        self._way, self._last_slots = self._numbered(source)
        wanted = [self._needs[node] for node in self._last]
        self._final = _Line(self.end, self._last_slots, (), (), wanted, self._places_of(self.end), needs=True)
        self._types: list[torch.dtype | None] = [None] * len(self._needs)

    def _numbered(self, source: Node) -> tuple["list[_Line]", tuple[int, ...]]:
        """The calls with numbers for nodes, so that a step looks nothing up; and the numbers of what the end reads."""
        self._needs = {source: False}
        for call in self.calls:
            needs = bool(call.operation.parameters) or any(self._needs[node] for node in call.inputs)
            self._needs.update(dict.fromkeys(call.outputs, needs))
        slots = {node: slot for slot, node in enumerate(self._needs)}
        way = []
        for call, spent in zip(self.calls, _last_uses(self.calls, self._last), strict=True):
            reads, writes, done = (tuple(slots[node] for node in nodes) for nodes in (call.inputs, call.outputs, spent))
            wanted = [self._needs[node] for node in call.inputs]
            places = self._places_of(call.operation)
            way.append(_Line(call.operation, reads, writes, done, wanted, places, needs=self._needs[call.outputs[0]]))
        return way, tuple(slots[node] for node in self._last)

    def _places_of(self, operation: "Operation | End") -> list[int]:
        return [self._places[id(p)] for p in operation.parameters]

    @property
    def unread(self) -> set[int]:
        """Ids of parameters that no way back reads: those of convolutions and linear maps of what needs no gradient,
        and of nothing else, as a weight may be used twice."""
        blind, others = set[int](), set[int]()
        for line in (*self._way, self._final):
            is_blind = isinstance(line.operation, Convolution | Linear) and not any(line.wanted)
            (blind if is_blind else others).update(id(p) for p in line.operation.parameters)
        return blind - others

    def note_rest(self) -> None:
        """Remembers what operations hold between two steps, for `drop`."""
        found = [each for call in self.calls for each in _with_parts(call.operation)]
        self._at_rest = [(one, dict(vars(one))) for one in (*found, *_with_parts(self.end))]

    def drop(self) -> None:
        """Lets go of what a `forward` has kept to which no `backward` comes. After a `note_rest`."""
        for operation, rest in self._at_rest:
            for name in [name for name, value in vars(operation).items() if value is not rest.get(name)]:
                if name in rest:
                    setattr(operation, name, rest[name])
                else:
                    delattr(operation, name)

    @property
    def reached(self) -> set[int]:
        """Ids of the parameters that the loss depends on."""
        found = {id(p) for p in self.end.parameters}
        wanted = set(self._last)
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
        """Inside, convolutions and attention are the library's, whose operations can be counted."""
        kept = [(op, op.backend) for op in (call.operation for call in self.calls) if isinstance(op, Replaceable)]
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
        values: list[Any] = [None] * len(self._needs)
        values[0] = x
        for line in self._way:
            reads, writes = line.reads, line.writes
            if len(reads) == 1:
                made = line.operation.forward(values[reads[0]])
            else:
                made = line.operation.forward(*[values[slot] for slot in reads])
            for slot in line.spent:
                values[slot] = None
            if len(writes) == 1:
                values[writes[0]] = made
            else:
                for slot, one in zip(writes, made, strict=True):
                    values[slot] = one
            if self.casts.half:
                self._note_types(values, writes)
        last = [values[slot] for slot in self._last_slots]
        values.clear()
        if not self._ends_plainly:
            last = [self.casts.value(value) for value in last]
        if self._dropout is None:
            return self.end.forward(*last, out=out)
        result: Tensor = self._dropout(self.end.forward(*last))
        return result if out is None else out.copy_(result)

    def latents(self) -> Tensor:
        """What the local head sees of the last `forward`: [B, D]."""
        return self.end.latents()

    def backward(self, latents_grad: Tensor) -> list[Tensor | None]:
        """The gradients of the block's parameters, in their order and shapes, from that of the latents [B, D]; None:
        nothing came back to it."""
        found: list[Tensor | None] = [None] * len(self._places)
        grads: list[Tensor | None] = [None] * len(self._needs)
        self._take(self._final, latents_grad, found, grads)
        for line in reversed(self._way):
            writes = line.writes
            if len(writes) == 1:
                given: Any = grads[writes[0]]
                grads[writes[0]] = None
                if given is None or not line.needs:
                    continue
                if self.casts.half:
                    given = given.to(self._types[writes[0]])
            else:
                given = [self._given(slot, grads) for slot in writes]
                if all(one is None for one in given) or not line.needs:
                    continue
            self._take(line, given, found, grads)
        return found

    def _given(self, slot: int, grads: list[Tensor | None]) -> Tensor | None:
        grad, grads[slot] = grads[slot], None
        kind = self._types[slot]
        return grad if grad is None or kind is None else grad.to(kind)

    def _take(self, line: "_Line", grad: Any, found: list[Tensor | None], grads: list[Tensor | None]) -> None:
        of_inputs, of_parameters = line.operation.backward(grad, line.wanted)
        for place, one in zip(line.places, of_parameters, strict=True):
            before = found[place]
            found[place] = one if before is None or one is None else before + one
        for slot, is_wanted, one in zip(line.reads, line.wanted, of_inputs, strict=True):
            if is_wanted and one is not None:
                before = grads[slot]
                grads[slot] = one if before is None else before + one

    def _note_types(self, values: Sequence[Any], slots: Sequence[int]) -> None:
        for slot in slots:
            if isinstance(values[slot], Tensor):
                self._types[slot] = values[slot].dtype


@dataclass(eq=False, slots=True)
class _Line:
    """A call as a step makes it: nodes are slots of a list, parameters places among the gradients."""

    operation: Operation | End
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    spent: tuple[int, ...]
    """What no later call reads."""
    wanted: list[bool]
    """Of which of `reads` a gradient is asked for."""
    places: list[int]
    needs: bool
    """A gradient must pass here."""


def _with_parts(operation: Any) -> Iterator[Any]:
    """An operation and those that it is made of."""
    yield operation
    for value in vars(operation).values():
        for part in value if isinstance(value, list | tuple) else [value]:
            if isinstance(part, Operation):
                yield from _with_parts(part)


def _last_uses(calls: Sequence[Call], last: Sequence[Node]) -> list[list[Node]]:
    """After each call, the values that no later one reads."""
    seen, spent = set(last), []
    for call in reversed(calls):
        done = [node for node in call.inputs if node not in seen]
        seen.update(done)
        spent.append(done)
    return spent[::-1]
