"""Which operations of a block run together, and what becomes of the rest: the one place that has the rules.

| neighbours                                           | become                                             |
| ---------------------------------------------------- | -------------------------------------------------- |
| BatchNorm, (leaky) ReLU                              | one pass after the statistics, one pass back       |
| the same at the block's end, its pool, the latents   | likewise, and no gradient of the activations' size |
| GroupNorm, (leaky) ReLU, SiLU or GELU; the same at   | likewise, by a backend that has it                 |
| the block's end, the latents                         | (`Abilities.groups`)                               |
| a sum of images, (leaky) ReLU, the latents, at the   | likewise, by a backend that has it                 |
| block's end; or the last two alone                   | (`Abilities.sums`, `Abilities.lone_ends`)          |
| the same and a convolution of the block's input      | likewise, and its weight gradient, by a backend    |
|                                                      | that has it for so many of a kernel's elements     |
|                                                      | (`Abilities.weight_gradient`)                      |
| a split into parts, and those who take them          | one call                                           |
| the same and the attention whose q, k, v they are    | likewise; a backend that has it writes gradients   |
|                                                      | into the whole (`Abilities.attention`)             |
| bias of a convolution or product, BatchNorm          | no bias: BatchNorm takes it out, its gradient is 0 |
| product, GELU by the normal distribution, or SiLU    | the derivative instead of the product is kept, and |
|                                                      | the bias's gradient made on the way back, by a     |
|                                                      | backend that has it (`Abilities.gelu`, `.silu`)    |
| LayerNorm of the block's input, the products that    | products of the standardised input: no gradient    |
| alone read it                                        | goes back through them                             |
| whatever the table does not have, in a row           | one piece for autograd                             |
"""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from unlocked.models import KeyedDropout
from unlocked.workers.graph.attention import Attention, SplitAttention, reader_of
from unlocked.workers.graph.autograd import AutogradPiece, Read
from unlocked.workers.graph.body import Call, GraphBody, PlainEnd
from unlocked.workers.graph.gelu import GeluLinear, gelu_of
from unlocked.workers.graph.grouped import grouped, grouped_end
from unlocked.workers.graph.normalized import ConvolvedEnd, Normalized, NormalizedEnd, UnevenEnd
from unlocked.workers.graph.operations import Add, Casts, Convolution, LayerNorm, Operation, Pool, geometry
from unlocked.workers.graph.pools import HalvingPool
from unlocked.workers.graph.products import Linear, Product
from unlocked.workers.graph.shapes import Reshaped, Sizes, Split, parts_of
from unlocked.workers.graph.standardized import ScaledLinear, ScaledProduct, Standardized, readers_of
from unlocked.workers.graph.sums import SumEnd
from unlocked.workers.graph.table import operation_of, slope_of, usable_norm
from unlocked.workers.graph.tails import pool_of, recognise
from unlocked.workers.graph.tracing import Node, Untraceable, gives_sparse, trace
from unlocked.workers.graph.verifying import check_same_result

if TYPE_CHECKING:
    from unlocked.workers.layer import Layer

__all__ = ["make_body"]


def make_body(layer: "Layer", backend: ModuleType, *, opened: bool = False, root: nn.Module | None = None) -> GraphBody:
    """The step of the layer's block on the operations of `backend`.

    Args:
        opened: it ends in the activations, as they are, in the latents' place.
        root: what is meant of the block, whose tail then is left out; None: all of it.

    Raises:
        Untraceable: the block as a whole is left to autograd; says why.
    """
    casts = Casts(layer.device.type, half=layer.computes_in_bfloat16)
    casts.transposed = backend.transposed if backend.ABILITIES.transposes else None
    part = layer.block.body if root is None else root
    if gives_sparse(part):
        raise Untraceable("its embedding gives sparse gradients")
    nodes, output = trace(part, layer.frozen)
    if layer.sample is not None and layer.device.type != "meta":
        check_same_result(part, layer.frozen, nodes, output, layer.sample.to(layer.device))
    tail, leaving = (layer.tail, layer.leaving) if root is None else (nn.Identity(), _as_it_is)
    plain = (tail, None, layer.info.layout, casts, leaving) if opened else None
    trains = [(name, p) for name, p in (layer.block if root is None else root).named_parameters() if p.requires_grad]
    body = _Planner(layer, backend, casts, nodes, output, plain).body([p for _, p in trains])
    if idle := [name for name, p in trains if id(p) not in body.reached]:
        raise Untraceable(f"its result does not depend on {', '.join(name.removeprefix('body.') for name in idle)}")
    return body


class _Planner:
    """Turns the nodes of one body into calls."""

    def __init__(
        self,
        layer: "Layer",
        backend: ModuleType,
        casts: Casts,
        nodes: Sequence[Node],
        output: Node,
        plain: tuple[Any, ...] | None,
    ) -> None:
        self._layer, self._backend, self._casts = layer, backend, casts
        self._plain = plain  # what the `PlainEnd` of a body takes that ends in its activations
        self._nodes, self._output = nodes, output
        self._frozen = {id(module) for module in layer.frozen}
        self._operations: dict[Node, Operation | str] = {}
        self._joined: dict[Node, Call] = {}  # by the last node that it covers
        self._covered: set[Node] = set()

    def body(self, trained: Sequence[nn.Parameter]) -> GraphBody:
        end, dropout = self._end()
        for node in self._nodes:
            if node not in self._covered:
                self._join_norm(node)
                self._join_group(node)
                self._join_entrance(node)
                self._join_parts(node)
                self._join_gelu(node)
        calls = [call for call in map(self._call, self._nodes[1:]) if call is not None]
        return GraphBody(
            self._nodes[0],
            [*self._grouped(calls, end.inputs), end],
            trained=trained,
            casts=self._casts,
            dropout=dropout,
        )

    def _end(self) -> tuple[Call, nn.Module | None]:
        """The block's end, and the tail's dropout, where that is not part of the end."""
        if self._plain is not None:
            return Call(PlainEnd(*self._plain), [self._output], [], [Node("activations", None)], "closed"), None
        layer, info = self._layer, self._layer.info
        tail = recognise(layer.block.tail)
        norm, slope = self._normalised(self._output)
        shape = info.activation_shape
        ending = [Node("logits" if layer.is_output else "latents", None)]
        if tail is None or tail.pool != "none":
            ending.append(Node("tail", None))
        if norm is None or tail is None or self._output.users or len(shape) == 2 or layer.is_output:
            side = None if layer.is_output else info.latent_size
            plain = (layer.tail, side, info.layout, self._casts, layer.leaving)
            grouping = (plain, ending, shape, self._operation, self._backend)
            call = grouped_end(self._output, *grouping) or self._summed(plain, ending)
            self._covered |= set(call.covers if call else ())
            return call or Call(PlainEnd(*plain), [self._output], [], ending, "closed"), None
        p = info.latent_size
        even = p == shape[0]
        if len(shape) == 3:
            sides = [p, tail.size] if tail.pool == "average" else [p]
            even = tail.pool != "mean" and all(length % side == 0 for length in shape[1:] for side in sides)
        kind = NormalizedEnd if even else UnevenEnd
        options = self._of_norm(norm) | {"latent_size": p, "pool": tail.pool, "pool_size": tail.size}
        covers = list(dict.fromkeys((norm, self._output)))
        why = "in one pass each way" if even else "in one pass; pooled by the library, whose windows overlap or are 2x2"
        given = (norm.target, slope, self._backend)
        convolution = self._joinable(norm.inputs[0]) if even else None
        if convolution is not None:
            covers.insert(0, norm.inputs[0])
            why = "in one pass each way, with the weight gradient"
        operation = kind(*given, **options) if convolution is None else ConvolvedEnd(convolution, *given, **options)
        self._covered |= set(covers)
        return Call(operation, covers[0].inputs, [], [*covers, *ending], "joined", why), tail.dropout

    def _summed(self, plain: tuple[Any, ...], ending: Sequence[Node]) -> Call | None:
        """The end of a block whose last operations are a sum of images and, maybe, a leaky ReLU, or that one alone;
        `plain`: what a `PlainEnd` takes."""
        output, info, slope = self._output, self._layer.info, slope_of(self._output)
        total, slope = (output, 1.0) if slope is None else (output.inputs[0], slope)
        alone = not output.users and (total is output or total.users == [output])
        shape, p = info.activation_shape, info.latent_size
        even = len(shape) == 3 and not self._layer.is_output and not any(length % p for length in shape[1:])
        if not self._backend.ABILITIES.sums or not alone or not even or slope < 0:
            return None
        if total is self._nodes[0]:
            return None
        if isinstance(self._operation(total), Add):
            # What a BatchNorm gives is nobody else's; sums don't mind their order.
            summands = sorted(_arguments(total), key=lambda node: not self._is_fresh(node))
            owns = self._is_fresh(summands[0]) and summands[0] is not summands[1]
            covers = list(dict.fromkeys((total, output)))
        elif total is not output and self._backend.ABILITIES.lone_ends:
            summands, covers, owns = [total], [output], isinstance(self._operation(total), Convolution)
        else:
            return None
        operation = SumEnd(*plain, slope=slope, backend=self._backend, owns_first=owns)
        return Call(operation, summands, [], [*covers, *ending], "joined", "in one pass each way")

    def _is_fresh(self, node: Node) -> bool:
        """A BatchNorm's result, on our kernels, that one operation alone reads: it may be written over."""
        return len(node.users) == 1 and self._normalised(node)[0] is node

    def _joinable(self, node: Node) -> Convolution | None:
        """The convolution before the block's last BatchNorm, where the backend makes its weight gradient on the way
        back through that: of the block's input, which needs no gradient."""
        operation = self._operations.get(node)
        if not isinstance(operation, Convolution):
            return None
        module = operation.conv
        plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.weight.requires_grad
        plain = plain and module.weight[0].numel() <= self._backend.ABILITIES.weight_gradient
        alone = len(node.users) == 1 and node.inputs == [self._nodes[0]]
        return operation if plain and alone else None

    def _normalised(self, node: Node) -> tuple[Node | None, float]:
        """The BatchNorm whose activations `node` gives, on our kernels, and their slope; 1: it is the BatchNorm."""
        slope = slope_of(node)
        norm, slope = (node, 1.0) if slope is None else (node.inputs[0], slope)
        if norm.kind not in (nn.BatchNorm1d, nn.BatchNorm2d) or usable_norm(norm) or id(norm.target) in self._frozen:
            return None, slope
        if norm is not node and (len(norm.users) > 1 or norm is self._output):
            return None, slope
        return norm, slope

    def _join_norm(self, node: Node) -> None:
        """A BatchNorm inside the block, with the activation after it if nobody else reads what it gives."""
        norm, _ = self._normalised(node)
        if norm is not node:
            return
        after = node.users[0] if len(node.users) == 1 and node is not self._output else None
        slope = None if after is None or after in self._covered else slope_of(after)
        covers = [node] if slope is None or after is None else [node, after]
        operation = Normalized(node.target, 1.0 if slope is None else slope, self._backend, **self._of_norm(node))
        how, why = ("closed", "") if len(covers) == 1 else ("joined", "in one pass")
        self._joined[covers[-1]] = Call(operation, norm.inputs, covers[-1:], covers, how, why)  # type: ignore[arg-type]
        self._covered |= set(covers)

    def _join_group(self, node: Node) -> None:
        """A GroupNorm inside the block, likewise."""
        call = grouped(node, self._output, self._operation, self._backend)
        if call is not None and self._covered.isdisjoint(call.covers):
            self._joined[call.covers[-1]] = call
            self._covered |= set(call.covers)

    def _join_entrance(self, node: Node) -> None:
        """A LayerNorm of the block's input, with the products that alone read it."""
        if node.inputs != [self._nodes[0]] or node is self._output or self._casts.half:
            return
        products = readers_of(node)
        taken = any(
            one in self._covered
            or not isinstance(self._operation(one), Linear | Product)
            or any(user.kind in (nn.BatchNorm1d, nn.BatchNorm2d) for user in one.users)  # which takes its bias
            for one in products
        )
        if not products or taken or not isinstance(self._operation(node), LayerNorm):
            return
        norm, why = node.target, "scale and shift are taken into the products"
        self._joined[node] = Call(Standardized(norm), node.inputs, [node], [node], "joined", why)
        self._covered.add(node)
        for one in products:
            why = "with the norm's scale and shift, and no gradient of what it reads"
            own = isinstance(self._operation(one), Linear)
            operation = ScaledLinear(one.target, norm) if own else ScaledProduct(norm)
            self._joined[one] = Call(operation, _arguments(one), [one], [one], "joined", why)
            self._covered.add(one)

    def _join_parts(self, node: Node) -> None:
        """What splits a tensor, with those who take the parts."""
        parts = parts_of(node)
        if not parts or node is self._output or any(part in self._covered for part in parts):
            return
        reader = reader_of(parts)
        attention = None if reader is None or self._output in parts else self._operation(reader)
        if reader is not None and isinstance(attention, Attention):
            order = [parts.index(one) for one in reader.inputs]
            covers, why = [node, *parts, reader], "its gradients are written where those of the whole belong"
            operation = SplitAttention(Split(node, parts), order, attention)
            self._joined[reader] = Call(operation, node.inputs, [reader], covers, "joined", why)
            self._covered |= set(covers)
            return
        self._joined[node] = Call(Split(node, parts), node.inputs, parts, [node, *parts], "closed")
        self._covered |= {node, *parts}

    def _join_gelu(self, node: Node) -> None:
        """A GELU or SiLU, with the product before it where nobody else reads that."""
        gelu = gelu_of(node, self._backend)
        if node in self._covered or gelu is None:
            return
        (before,) = node.inputs
        alone = len(before.users) == 1 and before.kind is nn.Linear and before not in self._covered
        if alone and isinstance(self._operation(before), Linear):
            both = GeluLinear(before.target, self._casts, self._backend, gelu)
            self._joined[node] = Call(both, before.inputs, [node], [before, node], "joined", "in one pass after it")
            self._covered |= {before, node}
        else:
            self._joined[node] = Call(gelu, node.inputs, [node], [node], "closed")
            self._covered.add(node)

    def _of_norm(self, norm: Node) -> dict[str, Any]:
        """The bias that stands before the BatchNorm, which its convolution or product then leaves out."""
        before = norm.inputs[0]
        alone = len(before.users) == 1 and before is not self._output
        kinds = {nn.Conv1d: Convolution, nn.Conv2d: Convolution, nn.Linear: Linear}
        operation = self._operation(before) if alone and before.kind in kinds else ""
        if isinstance(operation, str):
            return {"bias": None, "owns_input": False}
        self._operations[before] = self._of_backend(
            kinds[before.kind](before.target, self._casts, bias_is_ahead=True), before
        )
        bias: Tensor | None = before.target.bias
        return {"bias": bias, "owns_input": True, "of_product": before.kind is nn.Linear}

    def _operation(self, node: Node) -> Operation | str:
        if node not in self._operations:
            self._operations[node] = self._of_backend(operation_of(node, self._casts), node)
            kept = id(node.target) in self._frozen
            if node.kind in (nn.BatchNorm1d, nn.BatchNorm2d):
                self._operations[node] = usable_norm(node) or "it is kept in eval mode"
            elif node.kind is KeyedDropout and kept:
                self._operations[node] = "it is kept in eval mode"
        return self._operations[node]

    def _of_backend(self, operation: Operation | str, node: Node) -> Operation | str:
        """The operation, by the backend's own where it has one, for these sizes."""
        if isinstance(operation, Pool) and self._backend.ABILITIES.pools and pool_of(node.target) == ("max", 2):
            return HalvingPool(self._backend, operation)
        if isinstance(operation, Attention) and self._backend.ABILITIES.attention:
            operation.backend = self._backend
        if isinstance(operation, Convolution) and self._backend.ABILITIES.convolutions and not self._casts.half:
            conv = operation.conv
            sizes = (conv.in_channels, conv.out_channels, conv.kernel_size, *geometry(conv), conv.groups)
            operation.backend = self._backend if self._backend.takes_convolution(*sizes) else None
        return operation

    def _call(self, node: Node) -> Call | None:
        if node in self._joined:
            return self._joined[node]
        if node in self._covered:
            return None
        if isinstance(node.target, Tensor):
            return Call(Read(node), [], [node], [node], "closed")
        operation = self._operation(node)
        if isinstance(operation, str):
            return Call(Operation(), node.inputs, [node], [node], "autograd", operation)
        own = isinstance(operation, Convolution) and operation.backend is not None
        why = "by the backend's own convolution" if own else ""
        inputs = node.inputs if isinstance(operation, Reshaped | Sizes) else _arguments(node)
        return Call(operation, inputs, [node], [node], "closed", why)

    def _grouped(self, calls: Sequence[Call], last: Sequence[Node]) -> list[Call]:
        """Calls that stand for autograd become pieces of as many as follow each other."""
        runs: list[list[Call]] = []
        for call in calls:
            if runs and call.how == "autograd" == runs[-1][-1].how:
                runs[-1].append(call)
            else:
                runs.append([call])
        needs: dict[Node, bool] = {self._nodes[0]: False}
        found = []
        for run in runs:
            call = self._piece(run, last, needs) if run[0].how == "autograd" else run[0]
            needy = bool(call.operation.parameters) or any(needs[node] for node in call.inputs)
            needs.update(dict.fromkeys(call.outputs, needy))
            found.append(call)
        return found

    def _piece(self, run: Sequence[Call], last: Sequence[Node], needs: dict[Node, bool]) -> Call:
        nodes = [call.outputs[0] for call in run]
        inside = set(nodes)
        inputs = list(dict.fromkeys(one for node in nodes for one in node.inputs if one not in inside))
        outputs = [node for node in nodes if node in last or any(user not in inside for user in node.users)]
        outputs = outputs or nodes[-1:]
        operation = AutogradPiece(nodes, inputs, outputs, [needs[node] for node in inputs], self._casts)
        why = "; ".join(dict.fromkeys(f"{node.name}: {call.why}" for node, call in zip(nodes, run, strict=True)))
        return Call(operation, inputs, outputs, nodes, "autograd", why)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _arguments(node: Node) -> list[Node]:
    """What the operation reads, in order, twice if it does so."""
    return [value for value in node.args if isinstance(value, Node)]
