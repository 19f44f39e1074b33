"""A block's body as a list of its operations, in the order in which they run.

`torch.fx` follows the body's own forward() down to torch's modules; what happens in there is known by their class. A
body that can't be followed, or that would be another one the next time, is refused with the reason.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from unlocked.models import KeyedDropout
from unlocked.models.errors import first_line
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.workers.graph.expansions import expansion_of

__all__ = ["Node", "Untraceable", "filled", "gives_sparse", "has_hooks", "in_training", "is_in_place", "trace"]


class Untraceable(Exception):
    """The block can't be had as a list of operations; says why, in half a sentence."""


@dataclass(eq=False)
class Node:
    """One operation of a body, or its input, or a parameter that is used as it is."""

    name: str
    """Where it stands: the module's path below the body, or what torch.fx calls a function's result."""
    target: Any
    """The module that is called, the function, a method's name, or the parameter; None: the body's input."""
    args: tuple[Any, ...] = ()
    """Positional arguments; values of other operations are their nodes, inside tuples and lists too."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    users: list["Node"] = field(default_factory=list)
    """Who reads the result, in order; the body's caller is not among them."""

    @property
    def kind(self) -> Any:
        """The module's or parameter's class, the function itself, or the method's name: what the table is asked for."""
        return type(self.target) if isinstance(self.target, nn.Module | torch.Tensor) else self.target

    @property
    def inputs(self) -> list["Node"]:
        """The nodes among the arguments, each once."""
        return list(dict.fromkeys(_nodes((self.args, self.kwargs))))


def trace(body: nn.Module, frozen: Sequence[nn.Module]) -> tuple[list[Node], Node]:
    """(the operations of `body` in training, its input first; the one that gives the activations).

    Args:
        frozen: what stays in eval mode.

    Raises:
        Untraceable: data decides what runs, forward() changes something beside its result, or it draws.
    """
    holder = _Holder(body)
    _refuse_hooks(body)
    generators = GlobalGenerators(SOURCES, torch.device("cpu"))
    with generators.keyed(0), in_training(body, frozen), _unchanged(body), _without_own_functions():
        before = generators.states()
        try:
            graph = _Tracer().trace(holder)
        except Untraceable:
            raise
        except Exception as error:  # whatever Python a forward() may hold
            raise Untraceable(f"torch.fx can't follow its forward(): {first_line(error)}") from error
        if generators.moved(before):
            raise Untraceable("its forward() draws random numbers that depend on no input")
    return _checked(*_as_nodes(holder, graph))


class _Holder(nn.Module):
    """So that a body of one module of torch is a call of it, too."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Any) -> Any:
        return self.body(x)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def create_node(self, *args: Any, **options: Any) -> fx.Node:
        # A graph of operations knows nothing of the modes in which a forward() runs some of them.
        if _modes() != self._modes:
            raise Untraceable("its forward() switches gradients or autocast")
        return super().create_node(*args, **options)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("data decides what its forward() runs")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, KeyedDropout) or has_hooks(m) or is_parametrized(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # Modules are intercepted wherever they are called, in other threads too.
        if not any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        expansion = None if any(map(has_hooks, m.modules())) else expansion_of(m, args, kwargs)
        if expansion is not None:
            return expansion()
        return super().call_module(m, forward, args, kwargs)


def _modes() -> tuple[bool, ...]:
    kinds = ("cpu", "cuda")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(torch.is_autocast_enabled, kinds)


@contextlib.contextmanager
def _without_own_functions() -> Iterator[None]:
    """Refuses functions with a way back of their own, which torch.fx would follow inside and so replace it."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise Untraceable(f"the autograd function {cls.__name__} has a way back of its own")
        return original.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


def gives_sparse(module: nn.Module) -> bool:
    """Gradients of its parameters, or some of them, are sparse tensors: an embedding was asked for them."""
    return any(getattr(one, "sparse", False) is True for one in module.modules())


def has_hooks(module: nn.Module) -> bool:
    """Something of the user's runs when it is called, or when its gradient passes."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def _refuse_hooks(body: nn.Module) -> None:
    general = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    if any(getattr(torch_module, name, None) for name in general):
        raise Untraceable("hooks are set on all modules")
    if hooked := [p for p in body.parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]:
        names = [name for name, p in body.named_parameters() if any(p is one for one in hooked)]
        raise Untraceable(f"hooks are set on {', '.join(names)}")


@contextlib.contextmanager
def in_training(body: nn.Module, frozen: Sequence[nn.Module]) -> Iterator[None]:
    """The body in training mode, but for what is frozen; then every module is in its own mode again."""
    modes = [(module, module.training) for module in body.modules()]
    body.train()
    for module in frozen:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _unchanged(body: nn.Module) -> Iterator[None]:
    """Puts back what a forward() has written to its modules, and refuses it."""
    before = [(name, m, dict(m.__dict__), dict(m._buffers)) for name, m in body.named_modules()]
    held = [
        (f"{name}.{key}".removeprefix("."), value, list(value.items() if isinstance(value, dict) else value))
        for name, _, attributes, _ in before
        for key, value in attributes.items()
        if isinstance(value, list | dict | set) and not key.startswith("_")
    ]
    buffers = [(name, b, b._version, b.clone()) for name, b in body.named_buffers()]
    found = []
    try:
        yield
    finally:
        for name, module, attributes, own in before:
            now = module.__dict__
            changed = [key for key in {*attributes, *now} if attributes.get(key, now) is not now.get(key, now)]
            if changed or any(module._buffers.get(key) is not value for key, value in own.items()):
                found.append(f"{name}.{', '.join(sorted(changed))}".removeprefix("."))
                now.clear()
                now.update(attributes)
                module._buffers.update(own)
        for name, container, items in held:
            now = list(container.items() if isinstance(container, dict) else container)
            if list(map(id, _flat(now))) != list(map(id, _flat(items))):
                found.append(name)
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(items)
        for name, buffer, version, value in buffers:
            if buffer._version != version:
                found.append(name)
                buffer.copy_(value)
    if found:
        raise Untraceable(f"its forward() changes {', '.join(dict.fromkeys(found))}")


def _flat(items: list[Any]) -> list[Any]:
    """Values, or those of pairs."""
    return [value for item in items for value in (item if isinstance(item, tuple) else (item,))]


def _as_nodes(holder: nn.Module, graph: fx.Graph) -> tuple[list[Node], Node]:
    made: dict[fx.Node, Node] = {}
    nodes = []
    output: Any = None
    for one in graph.nodes:
        if one.op == "output":
            output = one.args[0]
            continue
        name, target = str(one.name), one.target
        if one.op == "placeholder":
            target = None
        elif one.op == "call_module":
            name, target = str(one.target).removeprefix("body").removeprefix("."), holder.get_submodule(str(one.target))
        elif one.op == "get_attr":
            name, target = str(one.target).removeprefix("body."), _attribute(holder, str(one.target))
        if _does_nothing(target):
            made[one] = made[one.args[0]]
            continue
        node = Node(name or "body", target)
        node.args, node.kwargs = fx.map_arg((one.args, dict(one.kwargs)), cast(Any, made.__getitem__))
        for given in node.inputs:
            given.users.append(node)
        made[one] = node
        nodes.append(node)
    if not isinstance(output, fx.Node):
        raise Untraceable(f"it gives a {type(output).__name__}, not one tensor")
    return nodes, made[output]


def _does_nothing(target: Any) -> bool:
    if not isinstance(target, nn.Identity | KeyedDropout) or has_hooks(target):
        return False
    return type(target) is nn.Identity or (isinstance(target, KeyedDropout) and target.p == 0.0)


def _attribute(holder: nn.Module, path: str) -> Any:
    value: Any = holder
    for part in path.split("."):
        if part.startswith("_tensor_constant"):
            raise Untraceable("its forward() makes a tensor that depends on no input")
        value = getattr(value, part)
    return value


def _checked(nodes: list[Node], output: Node) -> tuple[list[Node], Node]:
    """In-place operations only where they are as good as others."""
    for node in nodes:
        if is_in_place(node):
            changed = node.inputs[0] if node.inputs else None
            if changed is None or len(changed.users) > 1 or changed is output:
                raise Untraceable(f"{node.name} changes in place what is read elsewhere")
            if changed.target is not None and not _is_fresh(changed):
                raise Untraceable(f"{node.name} changes in place what may be a view")
    return nodes, output


def _is_fresh(node: Node) -> bool:
    """Its result shares no memory with anything that it was given."""
    if isinstance(node.target, nn.Module):
        return not isinstance(node.target, nn.Identity | nn.Flatten | nn.Unflatten | KeyedDropout)
    return node.target in _FRESH


_FRESH = {operator.add, operator.iadd, operator.mul, operator.imul, torch.add, torch.mul}
_IN_PLACE = {operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.setitem}


def is_in_place(node: Node) -> bool:
    """It writes to its first argument."""
    if isinstance(node.target, torch.Tensor):
        return False
    if getattr(node.target, "inplace", False) is True or node.kwargs.get("inplace"):
        return True
    if isinstance(node.target, nn.Module):
        return False
    if inspect.isfunction(node.target):
        with contextlib.suppress(TypeError, ValueError):
            if inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"):
                return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or node.target in _IN_PLACE


def _nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _nodes(one)
    elif isinstance(value, Mapping):
        yield from _nodes(tuple(value.values()))
    elif isinstance(value, slice):
        yield from _nodes((value.start, value.stop, value.step))


def filled(value: Any, values: Mapping[Node, Any]) -> Any:
    """`value` with the nodes in it replaced by what they have given."""
    if isinstance(value, Node):
        return values[value]
    if isinstance(value, tuple):
        return tuple(filled(one, values) for one in value)
    if isinstance(value, list):
        return [filled(one, values) for one in value]
    if isinstance(value, dict):
        return {key: filled(one, values) for key, one in value.items()}
    if isinstance(value, slice):
        return slice(*(filled(one, values) for one in (value.start, value.stop, value.step)))
    return value
