"""What the table does not have: neighbouring operations of a body as one piece that runs through autograd."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from unlocked.workers.graph.operations import Casts, Gradients, Operation
from unlocked.workers.graph.tracing import Node, filled, is_in_place
from unlocked.workers.group_norms import GroupNormGuard

__all__ = ["AutogradPiece", "Read", "call"]


class Read(Operation):
    """A parameter or buffer that a forward() uses as it is."""

    def __init__(self, node: Node) -> None:
        self._value: Any = node.target
        trains = isinstance(self._value, nn.Parameter) and self._value.requires_grad
        self.parameters = [self._value] if trains else []

    def forward(self, *inputs: Any) -> Any:
        return self._value.detach() if isinstance(self._value, Tensor) else self._value

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return [], [grad]


@dataclass(frozen=True)
class Parts:
    """The gradient of a value that is several tensors: one of each, or None."""

    found: Sequence[Tensor | None]

    def __add__(self, other: "Parts") -> "Parts":
        pairs = zip(self.found, other.found, strict=True)
        return Parts([b if a is None else a if b is None else a + b for a, b in pairs])

    def to(self, kind: torch.dtype | None) -> "Parts":
        """As it is: every tensor has its own type."""
        return self


class AutogradPiece(Operation):
    """Neighbours in a body's order. What goes in and out of it is detached, tensors in tuples and the like as well.

    Args:
        nodes: the operations, in order.
        inputs: whose values it reads, all from before it.
        outputs: whose values are read after it.
        needed: of which inputs a gradient is wanted.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        inputs: Sequence[Node],
        outputs: Sequence[Node],
        needed: Sequence[bool],
        casts: Casts,
    ) -> None:
        self._nodes, self._inputs, self._outputs, self._needed, self._casts = nodes, inputs, outputs, needed, casts
        modules = [node.target for node in nodes if isinstance(node.target, nn.Module)]
        found = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.parameters = list({id(p): p for p in found}.values())
        self.may_skip = any(any(p.requires_grad for p in m.parameters()) and not _is_of_torch(m) for m in modules)
        self._writes = any(is_in_place(node) for node in nodes)
        self._group_norms = GroupNormGuard(casts.device)
        self._asked: list[Tensor] = []
        self._entered: list[Any] = []
        self._made: list[Any] = []

    def forward(self, *inputs: Any) -> Any:
        """The values of `outputs`: the one, or a tuple of several."""
        self._entered = [_detached(x, needed) for x, needed in zip(inputs, self._needed, strict=True)]
        values: dict[Node, Any] = {}
        self._asked = []
        with torch.enable_grad(), self._casts.autocast(), self._group_norms.active(self._asked):
            for node, x in zip(self._inputs, self._entered, strict=True):
                values[node] = _pytree.tree_map_only(Tensor, Tensor.clone, x) if self._writes else x
            for node in self._nodes:
                values[node] = call(node, values)
        self._made = [values[node] for node in self._outputs]
        given = tuple(_detached(x) for x in self._made)
        return given[0] if len(given) == 1 else given

    def backward(self, grad: Any, wanted: Sequence[bool]) -> Gradients:
        """From a gradient for each output; None where nothing comes back to it."""
        entered, made, asked = self._entered, self._made, self._asked
        self._entered, self._made, self._asked = [], [], []
        grads = grad if isinstance(grad, list | tuple) else [grad]
        pairs = [
            (one, of_one)
            for x, g in zip(made, grads, strict=True)
            for one, of_one in zip(_tensors(x), g.found if isinstance(g, Parts) else [g], strict=False)  # None: of all
            if one.requires_grad and of_one is not None
        ]
        leaves = [one for x in entered for one in _tensors(x) if one.requires_grad]
        targets: list[Tensor] = [*leaves, *self.parameters, *asked]
        found: Sequence[Tensor | None] = [None] * len(targets)
        if pairs and targets:
            outputs, of_outputs = zip(*((x, g.to(x.dtype)) for x, g in pairs), strict=True)
            found = torch.autograd.grad(outputs, targets, of_outputs, allow_unused=True)
        by_leaf = iter(found[: len(leaves)])
        of_inputs: list[Any] = []
        for x in entered:
            mine = [next(by_leaf) if one.requires_grad else None for one in _tensors(x)]
            of_inputs.append(mine[0] if isinstance(x, Tensor) else Parts(mine) if mine else None)
        return of_inputs, found[len(leaves) : len(leaves) + len(self.parameters)]


def _tensors(value: Any) -> list[Tensor]:
    """A value's tensors, in order: itself, or what stands in its tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    return [one for one in _pytree.tree_leaves(value) if isinstance(one, Tensor)]


def _detached(value: Any, needed: bool = False) -> Any:
    """`value` apart from the graph, each of its tensors with a gradient of its own if `needed`."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(needed and value.is_floating_point())
    return _pytree.tree_map_only(Tensor, lambda one: _detached(one, needed), value)


def _is_of_torch(module: nn.Module) -> bool:
    """Exactly one of torch's modules, all of whose parameters have a part in the result."""
    return type(module).__module__.startswith("torch.nn.modules.")


def call(node: Node, values: Mapping[Node, Any]) -> Any:
    """Runs a node's module, function or method as it is, on the values of others."""
    args, kwargs = filled(node.args, values), filled(dict(node.kwargs), values)
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
