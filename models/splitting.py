"""A network in one module (torchvision's and timm's kind) as a list of blocks: cut where the caller says.

The module's own forward() is traced by torch.fx down to the places of the cuts and no further: modules without a cut
inside stay whole, with whatever Python their forward() holds.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from torch import fx, nn

from unlocked.models.blocks import Block, Origin
from unlocked.models.following import follow
from unlocked.models.named_draws import DRAWING_NAMES

__all__ = ["split"]

# fmt: off
_WRITING = {
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
}
# fmt: on


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
            such as a residual connection around it; a forward() that torch.fx can't follow, or that is another in
            training than in evaluation (`if self.training`), or each time it is called; dropout as a function call.
    """
    graph = follow(module, _checked_names(module, at))
    fixed = _fixed(graph)
    segments = _segments(graph, list(at), fixed)
    owners = {node: number for number, (_, nodes) in enumerate(segments) for node in nodes}
    blocks = []
    for number, (name, nodes) in enumerate(segments):
        entering = _entering(graph, owners, fixed, number, name)
        leaving = graph.output_node().args[0]
        if number + 1 < len(segments):
            leaving = _entering(graph, owners, fixed, number + 1, segments[number + 1][0])
        block = Block.wrap(_segment_module(module, nodes, entering, leaving), name)
        block.origin = Origin(module=module)
        blocks.append(block)
    return blocks


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


def _fixed(graph: fx.Graph) -> set[fx.Node]:
    """What does not depend on the input: parameters, buffers and expressions of them, which any layer that reads them
    may work out anew. What draws or writes is done once, where it stands."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        pure = node.op in ("call_function", "call_method") and not any(map(_acts, [node, *node.users]))
        if node.op == "get_attr" or (pure and node.all_input_nodes and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
    return fixed


def _acts(node: fx.Node) -> bool:
    """It draws random numbers, or may write into what it reads."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    writes = name.endswith("_") or name in _WRITING or node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    return bool(writes) or name in DRAWING_NAMES


def _segments(graph: fx.Graph, at: list[str], fixed: Set[fx.Node]) -> list[tuple[str, list[fx.Node]]]:
    """(name, nodes) of every layer in order of execution; values that are looked up anew in each are in none."""
    waiting = set(at)
    segments: list[tuple[str, list[fx.Node]]] = [("", [])]
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in fixed:
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


def _entering(graph: fx.Graph, owners: Mapping[fx.Node, int], fixed: Set[fx.Node], number: int, name: str) -> fx.Node:
    """The one value that the layer `number` takes over from all before it."""
    crossing = [
        node
        for node in graph.nodes
        if node.op != "output"
        and node not in fixed
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
        if node not in copies:  # a parameter or buffer of a module that was followed into, or an expression of them
            copies[node] = graph.node_copy(node, copy_of)
        return copies[node]

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    graph.output(copy_of(leaving))
    graph.lint()
    return fx.GraphModule(root, graph)
