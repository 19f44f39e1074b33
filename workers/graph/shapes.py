"""Operations that compute nothing: other shapes, other orders of dimensions, parts, and the sizes that they ask for."""

import builtins
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unlocked.workers.graph.operations import Gradients, Operation
from unlocked.workers.graph.tracing import Node, filled

__all__ = ["Moved", "Reshaped", "Sizes", "Split", "is_size", "parts_of"]

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem, operator.truediv}
_SPLITTING: Mapping[Any, str] = {"unbind": "unbind", "chunk": "chunk", "split": "split"} | {
    getattr(torch, name): name for name in ("unbind", "chunk", "split")
}


def is_size(node: Node) -> bool:
    """Its value is a number, or several, that follow from shapes alone."""
    if node.target is builtins.getattr:
        return node.args[1:] in (("shape",), ("ndim",))
    if node.target in ("size", "dim", "numel", "nelement"):
        return True
    return not isinstance(node.target, Tensor) and _is_arithmetic(node) and all(map(is_size, node.inputs))


def _is_arithmetic(node: Node) -> bool:
    return callable(node.target) and node.target in _ARITHMETIC and bool(node.inputs)


def parts_of(node: Node) -> list[Node]:
    """The parts that are read of what `node` splits; empty: it does not split, or is read otherwise."""
    if isinstance(node.target, torch.nn.Module | Tensor) or node.target not in _SPLITTING:
        return []
    plain = [user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users]
    known = node.inputs == list(node.args[:1])  # the tensor alone, and not by its name
    return list(node.users) if node.users and all(plain) and known else []


class _Filled(Operation):
    """Of a node's own function or method, with the values of other nodes among its arguments: a call of it reads
    `node.inputs`, whatever tuples, lists and names those stand in."""

    def __init__(self, node: Node) -> None:
        self.node, self._inputs = node, node.inputs
        self._target = node.target

    def _result(self, inputs: Sequence[Any]) -> Any:
        values = dict(zip(self._inputs, inputs, strict=True))
        args, kwargs = filled(self.node.args, values), filled(dict(self.node.kwargs), values)
        if isinstance(self._target, str):
            return getattr(args[0], self._target)(*args[1:], **kwargs)
        return self._target(*args, **kwargs)


class Sizes(_Filled):
    """Numbers, to which nothing comes back."""

    def forward(self, *inputs: Any) -> Any:
        return self._result(inputs)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return [None] * len(wanted), []


class Reshaped(_Filled):
    """The same values in the same order in another shape."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        # What a module has in rows may have its channels together here, so that no view of it exists.
        if node.target == "view" and not node.kwargs and not any(isinstance(one, torch.dtype) for one in node.args):
            self._target = "reshape"

    def forward(self, *inputs: Any) -> Any:
        self._shape = inputs[0].shape
        return self._result(inputs)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return [grad.reshape(self._shape), *[None] * (len(wanted) - 1)], []


class Moved(Operation):
    """Dimensions in another order.

    Args:
        function: of the tensor.
        inverse: brings a gradient into the old order.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]) -> None:
        self._function, self._inverse = function, inverse

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)

    def backward(self, grad: Tensor, wanted: Sequence[bool]) -> Gradients:
        return [self._inverse(grad)], []


class Split(Operation):
    """A tensor's parts along one dimension: unbind, chunk or split.

    Args:
        node: what splits.
        parts: each takes one of them, by its number.
    """

    def __init__(self, node: Node, parts: Sequence[Node]) -> None:
        self._kind = _SPLITTING[node.target]
        self._args, self._kwargs = node.args[1:], dict(node.kwargs)
        self._numbers = [part.args[1] for part in parts]

    def forward(self, x: Tensor) -> Any:
        self._order = (x.shape, torch.empty_like(x, device="meta").stride())  # dense, its dimensions in the order of x
        whole = getattr(torch, self._kind)(x, *self._args, **self._kwargs)
        self._numbers = [number % len(whole) for number in self._numbers]
        found = tuple(whole[number] for number in self._numbers)
        return found if len(found) > 1 else found[0]

    def backward(self, grad: Any, wanted: Sequence[bool]) -> Gradients:
        given = grad if isinstance(grad, list | tuple) else [grad]
        whole, places = self.empty(next(one for one in given if one is not None))
        written: set[int] = set()
        for number, place, one in zip(self._numbers, places, given, strict=True):
            if one is not None:
                place.add_(one) if number in written else place.copy_(one)
                written.add(number)
            elif number not in written:
                place.zero_()
        return [whole], []

    def empty(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Room for the gradient of what was split, and its parts, as they are read; what nobody reads is zero.

        In the order of what was split, so that whoever turned that round needs no copy of its own.
        """
        whole = torch.empty_strided(*self._order, dtype=like.dtype, device=like.device)
        places = getattr(torch, self._kind)(whole, *self._args, **self._kwargs)
        for number, place in enumerate(places):
            if number not in self._numbers:
                place.zero_()
        return whole, [places[number] for number in self._numbers]
