"""The graph of a network's own forward(), down to the modules that stay whole; what no graph holds for good is refused.

A graph is made once and runs always: what forward() decides in Python while it is followed stays as it was then. So it
is followed in training and in evaluation mode, twice in the first, and all must give the same graph.
"""

import inspect
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from unlocked.models.errors import first_line
from unlocked.models.hooks import hook_on, runs_when_called

__all__ = ["follow"]

_LONGEST = 80  # characters of an operation in an error


def follow(module: nn.Module, at: Sequence[str]) -> fx.Graph:
    """The operations of `module`'s forward(), which takes one tensor; modules without one of `at` inside are one each.

    Raises:
        ValueError: a forward() that torch.fx can't follow, that takes or gives anything but one tensor, that calls
            dropout as a function, or that is another in training than in evaluation or from one call to the next; hooks
            on a module that is followed, whose call no layer is.
    """
    _refuse_hooks(module, at)
    modes = [(one, one.training) for one in module.modules()]
    graphs, constants = [], []
    try:
        for training in (True, True, False):
            for one, _ in modes:
                one.training = training
            graphs.append(_follow_once(module, at))
            constants.append(_take_constants(module, graphs[-1]))
    finally:
        for one, mode in modes:
            one.training = mode
    kind = type(module).__name__
    if found := _difference(graphs[0], graphs[1], constants[0], constants[1]):
        raise ValueError(
            f"the forward() of {kind} is another each time it is called ({found[0]}, then {found[1]}), but a traced "
            "layer would always do the same; put what changes into a module of its own, without a cut inside"
        )
    if found := _difference(graphs[0], graphs[2], constants[0], constants[2]):
        raise ValueError(
            f"the forward() of {kind} is another in training ({found[0]}) than in evaluation ({found[1]}), but a "
            "traced layer would always do the same; put what depends on self.training into a module of its own, "
            "without a cut inside, such as nn.Dropout or nn.RReLU"
        )
    for name, value in constants[0].items():
        setattr(module, name, value)
    return graphs[0]


class _Tracer(fx.Tracer):
    """Follows calls into modules that hold a cut; all others are one node. Buffers are read by their names whenever the
    graph runs, as parameters are: else an expression of one would be its value of today."""

    def __init__(self, at: Sequence[str]) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not _holds_cut(module_qualified_name, self._at)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if found is not attr_val or not isinstance(attr_val, Tensor) or isinstance(attr_val, nn.Parameter):
            return found
        name = next((name for name, one in self.root.named_buffers() if one is attr_val), None)
        if name is None:
            return found
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            parameter_proxy_cache[name] = _BufferProxy(node, self, attr_val)
        return parameter_proxy_cache[name]


class _BufferProxy(fx.Proxy):
    """A buffer whose sizes forward() may use as numbers, in Python."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: Tensor) -> None:
        super().__init__(node, tracer)
        self._value = value

    @property
    def shape(self) -> torch.Size:
        return self._value.shape

    @property
    def ndim(self) -> int:
        return self._value.ndim

    def size(self, dim: int | None = None) -> Any:
        return self._value.shape if dim is None else self._value.shape[dim]

    def dim(self) -> int:
        return self._value.dim()

    def numel(self) -> int:
        return self._value.numel()

    def __len__(self) -> int:
        return len(self._value)


def _refuse_hooks(module: nn.Module, at: Sequence[str]) -> None:
    for name, one in module.named_modules():
        what = runs_when_called(one) if not name else hook_on(one) if _holds_cut(name, at) else None
        if what:
            where = f"{name}, a {type(one).__name__}," if name else f"the {type(one).__name__}"
            raise ValueError(
                f"{where} has {what}, but is cut into layers and never called as a whole; remove it, or hang hooks on "
                "modules without a cut inside"
            )


def _holds_cut(name: str, at: Sequence[str]) -> bool:
    return any(cut.startswith(f"{name}.") for cut in at)


def _follow_once(module: nn.Module, at: Sequence[str]) -> fx.Graph:
    parameters = list(inspect.signature(module.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    kind = type(module).__name__
    try:
        graph = _Tracer(at).trace(module, concrete_args=defaults or None)
    except Exception as error:  # whatever Python a forward() may hold
        mode = "" if module.training else ", in evaluation"
        raise ValueError(
            f"torch.fx can't follow the forward() of {kind}{mode} ({first_line(error)}); give a list of modules "
            "instead, one per layer"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[len(inputs) - len(defaults) :]:
        _erase_with_users(graph, node)  # the default went in as a constant; only assertions about it are left
    del inputs[len(inputs) - len(defaults) :]
    output = graph.output_node().args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        mode = "" if module.training else ", in evaluation"
        raise ValueError(
            f"{kind} takes {len(inputs)} inputs and gives a {type(output).__name__}{mode}; a network takes one tensor "
            "and gives one"
        )
    for node in graph.nodes:
        if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
            raise ValueError(
                f"{kind} calls {node.target.__name__}() as a function, which the traced layer would do in evaluation "
                "too, or never; use an nn.Dropout module"
            )
    return graph


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _take_constants(module: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Tensors that forward() made of no input; torch.fx leaves them in the module, under names of its own."""
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    taken = {name: vars(module)[name] for name in sorted(names) if name.startswith("_tensor_constant")}
    for name in taken:
        delattr(module, name)
    return taken


def _difference(
    first: fx.Graph, second: fx.Graph, constants: dict[str, Any], others: dict[str, Any]
) -> tuple[str, str] | None:
    """The first operation of each in which the two differ, in words."""
    twins: dict[fx.Node, fx.Node] = {}
    for a, b in zip_longest(first.nodes, second.nodes):
        if a is None or b is None or (a.op, a.target) != (b.op, b.target):
            return _shown(a), _shown(b)
        mine = _arguments(fx.node.map_arg(a.args, twins.__getitem__), fx.node.map_arg(a.kwargs, twins.__getitem__))
        theirs = _arguments(b.args, b.kwargs)
        if parts := [key for key in mine | theirs if not _equal(mine.get(key, a), theirs.get(key, b))]:
            return _shown(a, parts), _shown(b, parts)
        if a.op == "get_attr" and a.target in constants and not _equal(constants[a.target], others[b.target]):
            return _value(constants[a.target]), _value(others[b.target])
        twins[a] = b
    return None


def _arguments(args: Any, kwargs: Any) -> dict[Any, Any]:
    """By place or name."""
    return {**dict(enumerate(args)), **kwargs}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and ((a == b) | ((a != a) & (b != b))).all()
        return bool(same)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _shown(node: fx.Node | None, parts: Sequence[Any] | None = None) -> str:
    """An operation as it would stand in code, with these of its arguments or all."""
    if node is None or node.op == "output":
        return "nothing"
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.op == "get_attr":
        return name
    held = _arguments(node.args, node.kwargs)
    shown = [held[key] if isinstance(key, int) else f"{key}={held[key]}" for key in parts or held if key in held]
    text = f"{name}({', '.join(map(str, shown))})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _value(value: Any) -> str:
    return f"a tensor {list(value.shape)}, first {value.flatten()[0].item():.4g}" if value.numel() else "a tensor"
