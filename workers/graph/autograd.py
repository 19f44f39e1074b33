"""What the table does not have: neighbouring operations of a body as one piece that runs through autograd."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


class AutogradPiece(Operation):
    """Neighbours in a body's order. What goes in and out of it is detached.

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
        self._entered = [
            x.detach().requires_grad_(needed) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x, needed in zip(inputs, self._needed, strict=True)
        ]
        values: dict[Node, Any] = {}
        self._asked = []
        with torch.enable_grad(), self._casts.autocast(), self._group_norms.active(self._asked):
            for node, x in zip(self._inputs, self._entered, strict=True):
                values[node] = x.clone() if self._writes and isinstance(x, Tensor) else x
            for node in self._nodes:
                values[node] = call(node, values)
        self._made = [values[node] for node in self._outputs]
        given = tuple(x.detach() if isinstance(x, Tensor) else x for x in self._made)
        return given[0] if len(given) == 1 else given

    def backward(self, grad: Any, wanted: Sequence[bool]) -> Gradients:
        """From a gradient for each output; None where nothing comes back to it."""
        entered, made, asked = self._entered, self._made, self._asked
        self._entered, self._made, self._asked = [], [], []
        grads = grad if isinstance(grad, list | tuple) else [grad]
        pairs = [
            (x, g)
            for x, g in zip(made, grads, strict=True)
            if g is not None and isinstance(x, Tensor) and x.requires_grad
        ]
        leaves = [x for x in entered if isinstance(x, Tensor) and x.requires_grad]
        targets: list[Tensor] = [*leaves, *self.parameters, *asked]
        found: Sequence[Tensor | None] = [None] * len(targets)
        if pairs and targets:
            outputs, of_outputs = zip(*((x, g.to(x.dtype)) for x, g in pairs), strict=True)
            found = torch.autograd.grad(outputs, targets, of_outputs, allow_unused=True)
        by_leaf = iter(found[: len(leaves)])
        of_inputs = [next(by_leaf) if _has_graph(x) else None for x in entered]
        return of_inputs, found[len(leaves) : len(leaves) + len(self.parameters)]


def _has_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _is_of_torch(module: nn.Module) -> bool:
    """Exactly one of torch's modules, all of whose parameters have a part in the result."""
    return type(module).__module__.startswith("torch.nn.modules.")


def call(node: Node, values: Mapping[Node, Any]) -> Any:
    """Runs a node's module, function or method as it is, on the values of others."""
    args, kwargs = filled(node.args, values), filled(dict(node.kwargs), values)
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)
