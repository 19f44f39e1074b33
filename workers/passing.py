"""Stages by whole passes: for rules that need more than a loss of activations and labels.

A `PassLayer` (`workers.pass_layer`) gives its rule a `LayerPass`; a `PassStage` makes rows of the data by the rules'
views, and brings the side channel from layer to layer and into the slots. Where no rule of a network asks for any of
this, neither is used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unlocked.rules import Carried
from unlocked.workers.actions import Item
from unlocked.workers.cargo import READ_OUT, Cargo, write
from unlocked.workers.layer import Layer, as_delivered
from unlocked.workers.pass_layer import PassLayer
from unlocked.workers.source import Source
from unlocked.workers.stage import Stage
from unlocked.workers.views import ViewMaker

__all__ = ["PassStage"]


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
