"""The task-and-consistency loss of ZeroLock (Dai et al., "ZeroLock: concurrent memory-efficient LLM training via
modular update decoupling", arXiv 2608.07974, 2026), for classes of samples and of tokens.

Layer k's local scores give p_k; it minimises alpha CE(p_k, y) + (1 - alpha) KL(p_k || p_(k-1)), in which p_(k-1), the
scores of the layer before, comes over the side channel and has no gradient. The first layer has the task alone.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.vocabulary import Before, linear_loss
from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Carried, LayerPass

__all__ = ["FrozenHeadConsistency", "TaskAndConsistency"]


class TaskAndConsistency(LocalRule):
    """Level 3: carries and receives the log-probabilities. The read-out is a linear classifier on the latents, which
    trains with the layer; the paper's, of language models, is the frozen head of the whole (`FrozenHeadConsistency`).

    Args:
        alpha: the share of the task, above 0 and at most 1.
    """

    takes = ("classification", "tokens")
    receives = ("log_probabilities",)

    def __init__(self, layer: LayerInfo, *, alpha: float = 0.7) -> None:
        super().__init__(layer)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it must lie in (0, 1]")
        self.alpha, self.layer = alpha, layer
        self.classifier = nn.Linear(layer.num_latents, layer.num_classes)
        places = layer.activation_shape[:1] if layer.task.dense else ()
        self.carries = {"log_probabilities": Carried((*places, layer.num_classes))}

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        found = self.scores(layer_pass.activations).log_softmax(1)
        (one,) = self.carries.values()
        return {"log_probabilities": found.reshape(-1, *one.shape)}

    def step(self, layer_pass: LayerPass) -> Tensor:
        own = self.scores(layer_pass.activations).log_softmax(1)
        before = layer_pass.carried.get("log_probabilities")
        if self.layer.task.dense:
            return self._of_positions(own, layer_pass, before)
        task = F.nll_loss(own, layer_pass.labels)
        if before is None:
            return task
        consistency = F.kl_div(before, own, reduction="batchmean", log_target=True)  # KL(own || before)
        return self.alpha * task + (1 - self.alpha) * consistency

    def scores(self, activations: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.layer.latents(activations))
        return scores

    def _of_positions(self, own: Tensor, layer_pass: LayerPass, before: Tensor | None) -> Tensor:
        """Means over the positions that count."""
        task, targets = self.layer.task, self.layer.targets(layer_pass.labels)
        loss = task.loss(own, targets)  # log-probabilities are scores as good as any
        if before is None:
            return loss
        counts = targets.ne(getattr(task, "ignore_index", -1))
        apart = F.kl_div(before.flatten(0, 1), own, reduction="none", log_target=True).sum(1)  # KL(own || before)
        consistency = apart.where(counts, 0).sum() / counts.sum().clamp_min(1)
        return self.alpha * loss + (1 - self.alpha) * consistency


class FrozenHeadConsistency(LocalRule):
    """Level 2, for language models: every layer is read out by the network's own frozen head, as in the paper.

        rule = partial(FrozenHeadConsistency, head=unlocked.models.frozen_head(model))
        Trainer(blocks, rule=rule, output_rule=partial(rule, on_scores=True), ...)

    The scores of the layer before are the same head's of this layer's own input, so that nothing of the size of the
    vocabulary travels, and [B, T, V] is never whole. The mean is over the positions that count.

    Args:
        head: with a method `hidden` [B, T, D] -> [B, T, D] and an attribute `head`, the linear map [V, D] that follows.
        alpha: the share of the task, above 0 and at most 1.
        on_scores: for the output layer, whose scores are its block's own.
        hand_on: "hidden": nothing but the hidden states travels, and a layer makes the scores of the one before again,
            a piece at a time. "scores": they travel, T V floats a sample, which spares that product, a third of the
            head's arithmetic, where an edge has the memory and the bandwidth. The loss is the same.
    """

    takes = ("tokens",)
    reads_head = True

    def __init__(
        self,
        layer: LayerInfo,
        *,
        head: nn.Module,
        alpha: float = 0.7,
        on_scores: bool = False,
        hand_on: Literal["hidden", "scores"] = "hidden",
    ) -> None:
        super().__init__(layer)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it must lie in (0, 1]")
        if not callable(getattr(head, "hidden", None)) or not isinstance(getattr(head, "head", None), nn.Linear):
            raise ValueError(f"head is a {type(head).__name__}; give what unlocked.models.frozen_head(model) makes")
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError(
                "head has weights that would be trained, by every layer; freeze it (requires_grad_(False))"
            )
        if hand_on not in ("hidden", "scores"):
            raise ValueError(f'hand_on is {hand_on!r}; valid: "hidden", "scores"')
        self.layer, self.alpha, self.on_scores, self.frozen = layer, alpha, on_scores, head
        self._made: Tensor | None = None  # [B, T, V] between `carry` and `step`
        if hand_on == "scores":
            self.receives = ("scores",)
            if not on_scores:
                self.carries = {"scores": Carried((layer.activation_shape[0], cast(nn.Linear, head.head).out_features))}

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        hidden = self._hidden(layer_pass.activations)
        self._made = cast(nn.Linear, self.frozen.head)(hidden)
        return {"scores": self._made}

    def step(self, layer_pass: LayerPass) -> Tensor:
        task: Any = self.layer.task
        targets = self.layer.targets(layer_pass.labels)
        linear = cast(nn.Linear, self.frozen.head)
        whole = self.on_scores and layer_pass.head is None
        own = (layer_pass.activations if self.on_scores else self._hidden(layer_pass.activations)).flatten(0, 1)
        weight: Tensor | None = None
        bias, hits = None, None
        if not whole:
            weight, bias, hits = layer_pass.head or (linear.weight, linear.bias, None)
        known, self._made = None if self._made is None else self._made.flatten(0, 1), None
        if self.layer.index == 0:
            if whole:
                found: Tensor = task.loss(own, targets)
                return found
            return linear_loss(own, weight, bias, targets, task.ignore_index, hits, known=known)
        arrived = layer_pass.carried.get("scores")
        if arrived is None:
            with torch.no_grad():
                before = Before(self._hidden(layer_pass.input).flatten(0, 1), linear.weight, linear.bias, self.alpha)
        else:
            before = Before(arrived.flatten(0, 1), None, None, self.alpha)
        return linear_loss(own, weight, bias, targets, task.ignore_index, hits, before=before, known=known)

    def scores(self, activations: Tensor) -> Tensor:
        if self.on_scores:
            return activations.flatten(0, 1)
        scores: Tensor = cast(nn.Linear, self.frozen.head)(self._hidden(activations).flatten(0, 1))
        return scores

    def _hidden(self, activations: Tensor) -> Tensor:
        found: Tensor = cast(Any, self.frozen).hidden(activations)
        return found
