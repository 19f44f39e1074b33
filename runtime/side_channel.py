"""What rules send beside activations and labels, planned for a whole network: known before the first step.

A tensor travels from the layer whose rule carries it to the last one whose rule receives it, through all between.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlocked.rules import Carried, LayerInfo, LocalRule, Views, has_scores
from unlocked.runtime.rule_declarations import check_declarations, check_views
from unlocked.workers.cargo import READ_OUT, Freight, Traffic

__all__ = ["SideChannel", "plan_side_channel"]


@dataclass(frozen=True)
class SideChannel:
    """Of one network; by default there is none.

    Attributes:
        views: how stage 0 makes rows of the data; None: a row per sample.
        leaves: of each layer, what travels on beside its training output.
        sums: of each layer, whether the running sum of scores travels on beside its evaluation output.
        num_classes: of that sum.
        inputs: of each layer, which tensors of the data come in beside its input, for it or a later one; empty: the
            samples alone.
    """

    views: Views | None = None
    leaves: tuple[Mapping[str, Carried], ...] = ()
    sums: tuple[bool, ...] = ()
    num_classes: int = 0
    inputs: tuple[Mapping[str, Carried], ...] = ()

    def traffic(self, layer: int) -> Traffic:
        """What travels between `layer` and the next one; empty: activations and labels and nothing else."""
        leaves = self.leaves[layer] if self.leaves else {}
        sums = bool(self.sums) and self.sums[layer]
        inputs = self.inputs[layer + 1] if self.inputs[layer + 1 :] else {}
        if self.views is None and not leaves and not sums and not inputs:
            return {}
        views = self.views or Views()
        total = {READ_OUT: Carried((self.num_classes,), torch.float32, per_sample=True)} if sums else {}
        return {
            "train": Freight(views.train, {**leaves, **inputs}),
            "statistics": Freight(views.train, inputs),
            "evaluate": Freight(views.evaluate, {**total, **inputs}),
        }

    @property
    def entering(self) -> Traffic:
        """What comes into the first layer beside the samples."""
        inputs = self.inputs[0] if self.inputs else {}
        return dict.fromkeys(("train", "statistics", "evaluate"), Freight(1, inputs)) if inputs else {}

    def arriving(self, layer: int) -> Mapping[str, Carried]:
        """What comes in beside the layer's training input."""
        return self.leaves[layer - 1] if layer and self.leaves else {}

    def rows(self, layer: int, samples: int) -> int:
        """Rows that `layer` sees of so many training samples; the output layer sees one view's."""
        is_output = layer == len(self.leaves) - 1
        return samples if self.views is None or is_output else samples * self.views.train


def plan_side_channel(
    infos: Sequence[LayerInfo],
    rules: Sequence[LocalRule],
    names: Sequence[str],
    sample: Tensor,
    inputs: tuple[Mapping[str, Carried], ...] = (),
) -> SideChannel:
    """The side channel for built rules.

    Args:
        names: what the rules are called in messages.
        sample: one sample of the data.
        inputs: see `SideChannel`.

    Raises:
        ValueError: rules that don't go together, or not with the data: views that differ or that the data does not
            give, a tensor that nobody carries, a read-out of layers without scores; names layer and rule.
    """
    last = len(rules) - 1
    for info, rule, name in zip(infos, rules, names, strict=True):
        check_declarations(rule, name, info.name)
    views = _common_views(infos, rules, names)
    if views is not None:
        if inputs and inputs[0]:
            raise ValueError(
                f"the rule {names[0]} makes its own rows of the samples, which have no {', '.join(inputs[0])}; a "
                "network whose layers read named tensors needs a rule without views"
            )
        check_views(views, sample, infos[0].num_classes, names[0])
    for info, rule, name in zip(infos, rules, names, strict=True):
        if rule.read_out is not None and not has_scores(rule):
            raise ValueError(
                f"the rule {name} of layer {info.name} has read_out {rule.read_out}, but no scores; give it a method "
                "scores(activations) -> [B, num_classes]"
            )
        if both := [one for one in rule.carries if inputs and one in inputs[0]]:
            raise ValueError(
                f"the rule {name} of layer {info.name} carries {', '.join(both)}, which is a tensor of the data; give "
                "it another name"
            )
        if READ_OUT in rule.carries:
            raise ValueError(
                f"the rule {name} of layer {info.name} carries a tensor called {READ_OUT!r}, the name of the running "
                "sum of scores; give it another name"
            )
    at_hand: dict[str, Carried] = {}
    arriving: list[dict[str, Carried]] = []
    for k, rule in enumerate(rules):
        arriving.append(dict(at_hand))
        if k and (missing := [one for one in rule.receives if one not in at_hand]):
            raise ValueError(
                f"the rule {names[k]} of layer {infos[k].name} receives {', '.join(missing)}, which no layer before it "
                f"carries (there is {', '.join(at_hand) or 'nothing'} on the side channel)"
            )
        at_hand |= dict(rule.carries)
    leaves: list[Mapping[str, Carried]] = [{}] * len(rules)
    wanted: set[str] = set()
    for k in range(last, 0, -1):
        wanted = (wanted - set(rules[k].carries)) | set(rules[k].receives)
        leaves[k - 1] = {name: one for name, one in arriving[k].items() if name in wanted}
    first = next((k for k, rule in enumerate(rules) if rule.read_out is not None), None)
    sums = [first is not None and first <= k < last for k in range(len(rules))]
    return SideChannel(views, tuple(leaves), tuple(sums), infos[-1].num_classes, inputs)


def _common_views(infos: Sequence[LayerInfo], rules: Sequence[LocalRule], names: Sequence[str]) -> Views | None:
    views = rules[0].views if len(rules) > 1 else None
    for k, rule in enumerate(rules[:-1]):
        if rule.views != views:
            raise ValueError(
                f"the rule {names[k]} of layer {infos[k].name} has the views {rule.views}, but {names[0]} of layer "
                f"{infos[0].name} has {views}; stage 0 makes the rows of the data for all layers, so give all of them "
                "rules with the same views"
            )
    return views
