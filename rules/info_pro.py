"""InfoPro (Wang, Ni, Song, Yang and Huang, "Revisiting locally supervised learning: an alternative to end-to-end
training", ICLR 2021).

A layer shall keep what it knows of the input and lose only what does not help the task: it minimises lambda1 [-I(h,
x)] + lambda2 [-I(h, y)]. I(h, x) is bounded by how well a small decoder reconstructs the network's input from the
activations, which therefore travels over the side channel. I(h, y) is a local classifier's cross-entropy, or in the
contrastive form a supervised contrastive loss of a local embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import pool_latents
from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Carried, LayerPass

__all__ = ["InfoPro", "InfoProContrastive", "supervised_contrast"]


class InfoPro(LocalRule):
    """Level 3: carries and receives the network's input, at most `side` pixels high and wide.

    Args:
        reconstruction: lambda1.
        task: lambda2.
        side: of the reconstructed image, where the input is one; larger ones are averaged down to it.
    """

    takes = ("classification",)

    receives = ("network_input",)

    def __init__(self, layer: LayerInfo, *, reconstruction: float = 1.0, task: float = 1.0, side: int = 32) -> None:
        super().__init__(layer)
        self.reconstruction, self.task = reconstruction, task
        self.latent_size, self.layout = layer.latent_size, layer.layout
        self.target_shape = _target_shape(layer.input_shape, side)
        self.carries = {"network_input": Carried(self.target_shape)}
        shape, target = layer.activation_shape, self.target_shape
        self.decoder: nn.Module
        if len(shape) == 3 and len(target) == 3:
            width = min(shape[0], 32)
            size = (target[1], target[2])
            upwards = nn.Upsample(size, mode="nearest")
            self.decoder = nn.Sequential(
                nn.Conv2d(shape[0], width, 1), nn.ReLU(), upwards, nn.Conv2d(width, target[0], 3, padding=1)
            )
        else:
            inner = 1
            for length in target:
                inner *= length
            self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(layer.num_features, inner), nn.Unflatten(1, target))
        self._make_task(layer)

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        return {"network_input": self._target(layer_pass)}

    def step(self, layer_pass: LayerPass) -> Tensor:
        reconstructed = self.decoder(layer_pass.activations)
        loss = F.mse_loss(reconstructed, self._target(layer_pass))
        return self.reconstruction * loss + self.task * self._task(layer_pass.activations, layer_pass.labels)

    def _target(self, layer_pass: LayerPass) -> Tensor:
        """The network's input: at the first layer its own."""
        arrived = layer_pass.carried.get("network_input")
        if arrived is not None:
            return arrived
        x = layer_pass.input
        if x.shape[1:] == self.target_shape:
            return x
        _, height, width = self.target_shape
        return F.adaptive_avg_pool2d(x, (height, width))

    def _make_task(self, layer: LayerInfo) -> None:
        self.head = nn.Linear(layer.num_latents, layer.num_classes)

    def _task(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(activations), labels)

    def scores(self, activations: Tensor) -> Tensor:
        """Of the local classifier, [B, n]."""
        scores: Tensor = self.head(pool_latents(activations, self.latent_size, self.layout))
        return scores


class InfoProContrastive(InfoPro):
    """Level 3: InfoPro with a supervised contrastive loss in the classifier's place. It makes no prediction of its own.

    Args:
        width: of the embedding.
        temperature: of its similarities.
    """

    scores = LocalRule.scores

    def __init__(self, layer: LayerInfo, *, width: int = 128, temperature: float = 0.07, **options: float) -> None:
        self.width, self.temperature = width, temperature
        super().__init__(layer, **options)  # type: ignore[arg-type]

    def _make_task(self, layer: LayerInfo) -> None:
        self.head = nn.Linear(layer.num_latents, self.width)

    def _task(self, activations: Tensor, labels: Tensor) -> Tensor:
        embedded = self.head(pool_latents(activations, self.latent_size, self.layout))
        return supervised_contrast(embedded, labels, self.temperature)


def supervised_contrast(embedded: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al., NeurIPS 2020) of one view: the mean, over samples i that have
    others P(i) of their class in the micro-batch, of -1/|P(i)| sum_p log exp(z_i z_p / T) / sum_(a != i) exp(z_i z_a
    / T). z are the rows [B, D], normalised. A micro-batch without two of a class has loss 0."""
    z = F.normalize(embedded, dim=1)
    similar = z @ z.T / temperature
    self_mask = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_share = similar - similar.masked_fill(self_mask, float("-inf")).logsumexp(1, keepdim=True)
    partners = (labels[:, None] == labels) & ~self_mask
    count = partners.sum(1)
    each = -log_share.masked_fill(~partners, 0).sum(1) / count.clamp_min(1)
    return each.sum() / (count > 0).sum().clamp_min(1)


def _target_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    return (shape[0], min(shape[1], side), min(shape[2], side)) if len(shape) == 3 else shape
