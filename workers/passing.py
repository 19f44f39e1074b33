"""Layers and stages by whole passes: for rules that need more than a loss of activations and labels.

A `PassLayer` gives its rule a `LayerPass`; a `PassStage` makes rows of the data by the rules' views, and brings the
side channel from layer to layer and into the slots. Where no rule of a network asks for any of this, neither is used.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.kernels.vocabulary import using
from unlocked.models.generators import mixed
from unlocked.rules import Carried, LayerPass, OutputHead
from unlocked.workers.actions import Item
from unlocked.workers.cargo import READ_OUT, Cargo, write
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.heads import PiecewiseHead, SplitBody, head_of, split_body
from unlocked.workers.layer import AutogradStep, Layer, as_delivered
from unlocked.workers.source import Source
from unlocked.workers.stage import Stage
from unlocked.workers.views import ViewMaker

__all__ = ["PassHeadStep", "PassLayer", "PassStage", "PassStep"]


class _Given(NamedTuple):
    """What a pass has from outside its layer."""

    epoch: int
    labels: Tensor
    carried: Mapping[str, Tensor]


class PassLayer(DrawingLayer):
    """Arguments as `DrawingLayer`. Whoever calls `forward` says by `begin` what the micro-batch brings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._given: _Given | None = None
        self.lr_factor = 1.0
        super().__init__(*args, **options, step=_step_of)
        self._pass_key = philox_int(self.info.seed, Purpose.RULE, self.info.index, 2)

    def begin(self, epoch: int, labels: Tensor, carried: Mapping[str, Tensor]) -> None:
        """The training micro-batch that comes next.

        Args:
            labels: [B], of the samples.
            carried: what arrives on the side channel.
        """
        self._given = _Given(epoch, labels, carried)

    def new_pass(self, x: Tensor, activations: Tensor) -> LayerPass:
        """The rule's view of a micro-batch whose forward is done."""
        assert self._given is not None, "forward without a begin"
        epoch, labels, carried = self._given
        self._given = None
        return LayerPass(
            input=x,
            activations=activations,
            labels=labels,
            block=self.block.body,
            step=self._steps,
            epoch=epoch,
            lr_factor=self.lr_factor,
            carried=carried,
            key=mixed(self._pass_key, self._steps),
            forward=self._forward_again,
            head=self.step.head_given() if isinstance(self.step, PassHeadStep) else None,
        )

    @torch.no_grad()
    def carry(self) -> Mapping[str, Tensor]:
        """What leaves on the side channel with the last `forward`.

        Raises:
            ValueError: it is not what the rule declares; names the tensor.
        """
        declared = self.rule.carries
        if not declared:
            return {}
        step = self.step
        assert isinstance(step, PassStep)
        with self._generators.keyed(mixed(self._bases["carry"], self._steps)):
            made = self.rule.carry(step.current())
        return _checked(made, declared)

    def set_lr_factor(self, factor: float) -> None:
        super().set_lr_factor(factor)
        self.lr_factor = factor

    def _forward_again(self, x: Tensor) -> Tensor:
        with self.autocast(), self.group_norms.active():
            activations: Tensor = self.block.body(x, **self.beside)
        return activations.float() if activations.dtype == torch.bfloat16 else activations


class PassStep(AutogradStep):
    """The local step of a rule that takes whole passes."""

    layer: PassLayer

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.why = f"the rule {type(layer.rule).__name__} takes whole passes"
        self._pass: LayerPass | None = None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        layer, x = self.layer, x.detach()
        with torch.set_grad_enabled(layer.rule.needs_graph), layer.autocast(), layer.group_norms.active():
            activations = self.activate(x)
        with torch.set_grad_enabled(layer.rule.needs_graph):
            seen = activations.float() if activations.dtype == torch.bfloat16 else activations
        self._pass = layer.new_pass(x, seen)
        with torch.no_grad():
            result = layer.leaving(layer.block.tail(activations.detach()))
            return result if out is None else out.copy_(result)

    def activate(self, x: Tensor) -> Tensor:
        """The activations as the rule sees them."""
        found: Tensor = self.layer.block.body(x, **self.layer.beside)
        return found

    def current(self) -> LayerPass:
        """The micro-batch between `forward` and `update`."""
        assert self._pass is not None, "no forward before"
        return self._pass

    def update(self, labels: Tensor) -> Tensor:
        layer, one = self.layer, self.current()
        self._pass = None
        for parameter in layer.parameters:
            parameter.grad = None
        with torch.set_grad_enabled(layer.rule.needs_graph), using(layer.kernels):
            loss = layer.rule.step(one)
            if not isinstance(loss, Tensor):
                raise ValueError(f"step() gives {type(loss).__name__}; it is the mean loss, a scalar tensor")
            if loss.requires_grad:
                loss.backward()
        if layer.optimizer is not None:
            layer.optimizer.step()
        with torch.no_grad():
            return self.tell(loss.detach(), one, labels)

    def tell(self, loss: Tensor, one: LayerPass, labels: Tensor) -> Tensor:
        """Adds the micro-batch to the layer's totals; the sum of its losses."""
        return self.layer.account(loss, one.activations, labels)


class PassHeadStep(PiecewiseHead, PassStep):
    """The same at an output layer whose rule makes the scores in pieces."""

    layer: PassLayer

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.split = cast(SplitBody, split_body(layer.block))

    def head_given(self) -> OutputHead:
        hits = torch.zeros((), dtype=torch.float64, device=self.layer.device)
        return OutputHead(self.head.weight, self.head.bias, hits)

    def activate(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def tell(self, loss: Tensor, one: LayerPass, labels: Tensor) -> Tensor:
        assert one.head is not None
        return self.account(loss, one.head.hits, labels)


def _step_of(layer: Layer) -> PassStep:
    in_pieces = layer.rule.reads_head and layer.is_output and layer.task.name == "tokens"
    return PassHeadStep(layer) if in_pieces and head_of(layer.block) is not None else PassStep(layer)


class PassStage(Stage):
    """A stage of a network in which rules need more than activations and labels.

    Args:
        leaves: of each layer, what travels on to the next one beside training activations.
        inputs: of each layer, the names of the data's tensors that travel on to the next one, whatever the item's kind.
        views: makes the rows of the data; None: a row per sample. Stage 0 makes them, all stages know of them.
    """

    def __init__(
        self,
        index: int,
        layers: Sequence[Layer],
        source: Source | None = None,
        *,
        leaves: Sequence[Mapping[str, Carried]],
        views: ViewMaker | None,
        inputs: Sequence[Sequence[str]],
    ) -> None:
        super().__init__(index, layers, source)
        self._views, self._inputs = views, inputs
        self._leaves = [(*one, *more) for one, more in zip(leaves, inputs, strict=True)]

    def load(self, item: Item) -> tuple[Any, Tensor]:
        assert self.source is not None
        x, labels = self.source.load(item)
        if not isinstance(x, Cargo):
            return as_delivered(x), labels
        return Cargo(as_delivered(x.activations), {n: as_delivered(one) for n, one in x.carried.items()}), labels

    def forward(self, item: Item, x: Any, labels: Tensor, out: Any = None) -> Tensor:
        x, carried = self._unpacked(item, x, labels)
        place = out.activations if isinstance(out, Cargo) else out
        if item.kind == "statistics":
            for layer in self.layers:
                layer.beside = {name: carried[name] for name in layer.needs}
                x = layer.infer(self._entering(layer, x, item), "statistics")
            if isinstance(out, Cargo):
                write(carried, out)
            return x if place is None else place.copy_(x)
        self._labels = labels
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = self._entering(layer, x, item)
            layer.beside = {name: carried[name] for name in layer.needs}
            if isinstance(layer, PassLayer):
                layer.begin(item.epoch, labels, carried)
            x = layer.forward(x, place if i == last else None)
            made = layer.carry() if isinstance(layer, PassLayer) else {}
            carried = {name: made[name] if name in made else carried[name] for name in self._leaves[i]}
            if i < last:
                layer.update(labels)
        if isinstance(out, Cargo):
            write(carried, out)
        return x

    def infer(self, x: Any) -> Tensor:
        carried: Mapping[str, Tensor] = {}
        if isinstance(x, Cargo):
            x, carried = x
        for layer in self.layers:
            layer.beside = {name: carried[name] for name in layer.needs}
            x = layer.infer(x, "evaluate")
        inferred: Tensor = x
        return inferred

    @torch.no_grad()
    def evaluate(self, item: Item, x: Any, labels: Tensor, out: Any = None) -> Tensor:
        x, carried = self._unpacked(item, x, labels)
        total = carried.get(READ_OUT)
        for layer in self.layers:
            layer.beside = {name: carried[name] for name in layer.needs}
            x, scores = layer.evaluate(self._entering(layer, x, item))
            if scores is not None:
                layer.score(scores, labels)
                weight = layer.rule.read_out
                if weight is not None:
                    total = weight * scores if total is None else total + weight * scores
        if self.is_last:
            self._finish_evaluation(x, labels, x if total is None else total)
        if isinstance(out, Cargo):
            out.activations.copy_(x)
            for name, place in out.carried.items():
                if name != READ_OUT:
                    place.copy_(carried[name])
                elif total is None:
                    place.zero_()
                else:
                    place.copy_(total)
            return out.activations
        return x if out is None else out.copy_(x)

    def _unpacked(self, item: Item, x: Any, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        if isinstance(x, Cargo):
            return x.activations, x.carried
        if self._views is not None and self.source is not None:
            x = as_delivered(self._views.make(item, x, labels))
        return x, {}

    def _entering(self, layer: Layer, x: Tensor, item: Item) -> Tensor:
        """The output layer sees the rows of one view."""
        if layer.is_output and self._views is not None:
            return self._views.probed(x, item.size)
        return x


def _checked(made: Mapping[str, Tensor], declared: Mapping[str, Carried]) -> dict[str, Tensor]:
    if not isinstance(made, Mapping) or made.keys() != declared.keys():
        got = ", ".join(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
        raise ValueError(f"carry() gives {got or 'nothing'}; the rule declares that it carries {', '.join(declared)}")
    tensors = {}
    for name, one in declared.items():
        value = made[name]
        if not isinstance(value, Tensor) or value.dtype != one.dtype or tuple(value.shape[1:]) != tuple(one.shape):
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            rows = "samples" if one.per_sample else "rows"
            raise ValueError(
                f"carry() gives {got} under the name {name!r}; declared is {one.dtype} [{rows}, "
                f"{', '.join(map(str, one.shape))}]"
            )
        tensors[name] = as_delivered(value.detach())
    return tensors
