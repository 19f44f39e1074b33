"""The task-and-consistency loss of ZeroLock (Dai et al., "ZeroLock: concurrent memory-efficient LLM training via
modular update decoupling", arXiv 2608.07974, 2026), for classes of samples and of tokens.

Layer k's local scores give p_k; it minimises alpha CE(p_k, y) + (1 - alpha) KL(p_k || p_(k-1)), in which p_(k-1), the
scores of the layer before, comes over the side channel and has no gradient. The first layer has the task alone.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Carried, LayerPass

__all__ = ["TaskAndConsistency"]


class TaskAndConsistency(LocalRule):
    """Level 3: carries and receives the log-probabilities. The read-out is a linear classifier on the latents, which
    trains with the layer; the paper's, of language models, is the frozen head of the whole.

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
