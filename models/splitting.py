"""A network in one module (torchvision's and timm's kind) as a list of blocks: cut where the caller says.

The module's own forward() is traced by torch.fx down to the places of the cuts and no further: modules without a cut
inside stay whole, with whatever Python their forward() holds.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from unlocked.models.blocks import Block, Origin
from unlocked.models.errors import first_line

__all__ = ["split"]


def split(module: nn.Module, at: Sequence[str]) -> list[Block]:
    """The layers of `module`: a new one begins at each of the submodules named in `at`.

        blocks = split(resnet18(num_classes=10), at=["layer1", "layer2", "layer3", "layer4", "avgpool"])

    What stands before the first of them (conv1, bn1, relu, maxpool) is a layer of its own, and what the module's
    forward() does between two submodules (flattening, say) belongs to the layer before the later one. The rule of a
    layer sees what leaves it. Layers are called after the submodule at which they begin, and their parameters keep
    their names below it. The blocks share `module`'s parameters, as no copy is made; set `latent_size` and the like on
    the blocks that are returned.

    Args:
        at: dotted names as in `module.named_modules()`, such as "layer2" or "layer2.1", in any order.

    Raises:
        ValueError: a name that is not there or that forward() does not reach; a cut that more than one value crosses,
            such as a residual connection around it; a forward() that torch.fx can't follow; dropout as a function call.
    """
    graph = _trace(module, _checked_names(module, at))
    segments = _segments(graph, list(at))
    owners = {node: number for number, (_, nodes) in enumerate(segments) for node in nodes}
    blocks = []
    for number, (name, nodes) in enumerate(segments):
        entering = _entering(graph, owners, number, name)
        leaving = graph.output_node().args[0]
        if number + 1 < len(segments):
            leaving = _entering(graph, owners, number + 1, segments[number + 1][0])
        block = Block.wrap(_segment_module(module, nodes, entering, leaving), name)
        block.origin = Origin(module=module)
        blocks.append(block)
    return blocks


class _Tracer(fx.Tracer):
    """Follows calls into modules that hold a cut; all others are one node."""

    def __init__(self, at: Sequence[str]) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(name.startswith(f"{module_qualified_name}.") for name in self._at)


def _checked_names(module: nn.Module, at: Sequence[str]) -> Sequence[str]:
    known = [name for name, _ in module.named_modules() if name]
    if isinstance(at, str) or not at:
        raise ValueError(f"at is a list of the submodules at which layers begin, such as ['layer1'], got {at!r}")
    if unknown := [name for name in at if name not in known]:
        top = ", ".join(name for name, _ in module.named_children())
        raise ValueError(
            f"{type(module).__name__} has no submodule {', '.join(map(repr, unknown))}; at its top are: {top} (and "
            "dotted names below them)"
        )
    if len(set(at)) != len(at):
        raise ValueError(f"at names a submodule twice: {', '.join(at)}")
    return at


def _trace(module: nn.Module, at: Sequence[str]) -> fx.Graph:
    parameters = list(inspect.signature(module.forward).parameters.values())
    defaults = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    try:
        graph = _Tracer(at).trace(module, concrete_args=defaults or None)
    except Exception as error:  # whatever Python a forward() may hold
        raise ValueError(
            f"torch.fx can't follow the forward() of {type(module).__name__} ({first_line(error)}); give a list of "
            "modules instead, one per layer"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[len(inputs) - len(defaults) :]:
        _erase_with_users(graph, node)  # the default went in as a constant; only assertions about it are left
    del inputs[len(inputs) - len(defaults) :]
    output = graph.output_node().args[0]
    if len(inputs) != 1 or not isinstance(output, fx.Node):
        raise ValueError(
            f"{type(module).__name__} takes {len(inputs)} inputs and gives a {type(output).__name__}; a network takes "
            "one tensor and gives one"
        )
    for node in graph.nodes:
        if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
            raise ValueError(
                f"{type(module).__name__} calls {node.target.__name__}() as a function, which the traced layer would "
                "do in evaluation too, or never; use an nn.Dropout module"
            )
    return graph


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


def _segments(graph: fx.Graph, at: list[str]) -> list[tuple[str, list[fx.Node]]]:
    """(name, nodes) of every layer in order of execution; values that are looked up anew in each are in none."""
    waiting = set(at)
    segments: list[tuple[str, list[fx.Node]]] = [("", [])]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        # The outermost cut that begins here names the layer; inner ones at the same place would be empty layers.
        for path in sorted(_modules_of(node) & waiting, key=len)[:1]:
            segments.append((path, []))
        waiting -= _modules_of(node)
        segments[-1][1].append(node)
    if waiting:
        raise ValueError(f"forward() reaches no operation of {', '.join(sorted(waiting))}; cut elsewhere")
    if not segments[0][1]:
        return segments[1:]
    first = next((str(node.target).split(".")[0] for node in segments[0][1] if node.op == "call_module"), "input")
    return [(first if first not in at else "input", segments[0][1]), *segments[1:]]


def _modules_of(node: fx.Node) -> set[str]:
    """The paths of all modules that the node belongs to."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack", {})
    paths = {str(path) for path, _ in stack.values()}
    if node.op == "call_module":
        paths.add(str(node.target))
    return paths - {""}


def _entering(graph: fx.Graph, owners: Mapping[fx.Node, int], number: int, name: str) -> fx.Node:
    """The one value that the layer `number` takes over from all before it."""
    crossing = [
        node
        for node in graph.nodes
        if node.op not in ("get_attr", "output")
        and owners.get(node, -1) < number
        and any(owners.get(user, len(owners)) >= number for user in node.users)
    ]
    if len(crossing) != 1:
        values = ", ".join(node.name for node in crossing) or "none"
        raise ValueError(
            f"{len(crossing)} values cross the cut before {name!r} ({values}), but a layer reads one tensor; cut where "
            "only one passes, so that residual connections lie inside a layer"
        )
    return crossing[0]


def _segment_module(root: nn.Module, nodes: Sequence[fx.Node], entering: fx.Node, leaving: Any) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {entering: graph.placeholder("x")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter or buffer of a module that was followed into
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    graph.output(copy_of(leaving))
    graph.lint()
    return fx.GraphModule(root, graph)
