"""The task-and-consistency loss of ZeroLock (Dai et al., "ZeroLock: concurrent memory-efficient LLM training via
modular update decoupling", arXiv 2608.07974, 2026), for classification.

Layer k's local scores give p_k; it minimises alpha CE(p_k, y) + (1 - alpha) KL(p_k || p_(k-1)), in which p_(k-1), the
scores of the layer before, comes over the side channel and has no gradient. The first layer has the task alone.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import pool_latents
from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Carried, LayerPass

__all__ = ["TaskAndConsistency"]


class TaskAndConsistency(LocalRule):
    """Level 3: carries and receives the log-probabilities. The read-out is a linear classifier on the latents, which
    trains with the layer; the paper's, of language models, is the frozen head of the whole.

    Args:
        alpha: the share of the task, above 0 and at most 1.
    """

    receives = ("log_probabilities",)

    def __init__(self, layer: LayerInfo, *, alpha: float = 0.7) -> None:
        super().__init__(layer)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha is {alpha!r}; it must lie in (0, 1]")
        self.alpha, self.latent_size, self.layout = alpha, layer.latent_size, layer.layout
        self.classifier = nn.Linear(layer.num_latents, layer.num_classes)
        self.carries = {"log_probabilities": Carried((layer.num_classes,))}

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        return {"log_probabilities": self.scores(layer_pass.activations).log_softmax(1)}

    def step(self, layer_pass: LayerPass) -> Tensor:
        own = self.scores(layer_pass.activations).log_softmax(1)
        task = F.nll_loss(own, layer_pass.labels)
        before = layer_pass.carried.get("log_probabilities")
        if before is None:
            return task
        consistency = F.kl_div(before, own, reduction="batchmean", log_target=True)  # KL(own || before)
        return self.alpha * task + (1 - self.alpha) * consistency

    def scores(self, activations: Tensor) -> Tensor:
        scores: Tensor = self.classifier(pool_latents(activations, self.latent_size, self.layout))
        return scores
