"""Predictive similarity (Nokland and Eidnes, "Training neural networks with local error signals", ICML 2019).

A layer minimises (1 - beta) L_pred + beta L_sim. L_pred is the cross-entropy of a local linear classifier on the pooled
activations. L_sim compares how alike the samples of a micro-batch are in the layer and in their labels:
|| S(f(a)) - S(Y) ||^2, the mean over all pairs, where S holds the cosine similarities of centred rows and Y is one-hot.
f is a local map of the layer's own width: for images a 3x3 convolution, whose feature maps count by their standard
deviations; for flat activations a linear map.
"""

from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.reading import read_latents

__all__ = ["PredictiveSimilarity", "similarities"]

_EPS = 1e-8  # of a variance: a map without any has a finite gradient
_FEW = 3  # maps, whose deviations alone would say too little: as the paper's code, all of their pixels count


class PredictiveSimilarity(LocalRule):
    """Level 1.

    Args:
        beta: the share of the similarity loss, 0 to 1; the paper's is 0.99. 1: similarity alone, 0: prediction alone.

    Raises:
        ValueError: beta is out of range.
    """

    takes = ("classification",)

    def __init__(self, layer: LayerInfo, *, beta: float = 0.99) -> None:
        super().__init__(layer)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is {beta!r}; it must lie in [0, 1]")
        self.beta, self.num_classes = beta, layer.num_classes
        self.latent_size, self.layout = layer.latent_size, layer.layout
        shape = layer.activation_shape
        self.similarity: nn.Module
        if len(shape) == 3:
            self.similarity = nn.Conv2d(shape[0], shape[0], 3, padding=1, bias=False)
        elif len(shape) == 2 and self.layout == "channels_first":
            self.similarity = nn.Conv1d(shape[0], shape[0], 3, padding=1, bias=False)
        else:
            self.similarity = nn.Linear(shape[-1], shape[-1], bias=False)
        self.classifier = nn.Linear(layer.num_latents, layer.num_classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        prediction = F.cross_entropy(self.scores(activations), labels)
        targets = F.one_hot(labels, self.num_classes).to(activations.dtype)
        features = self._features(self.similarity(activations))
        similarity = F.mse_loss(similarities(features), similarities(targets))
        return (1 - self.beta) * prediction + self.beta * similarity

    def scores(self, activations: Tensor) -> Tensor:
        """The local classifier's, [B, n]."""
        scores: Tensor = self.classifier(read_latents(activations, self.latent_size, self.layout))
        return scores

    def _features(self, maps: Tensor) -> Tensor:
        """[B, C]: what a feature map is compared by."""
        if maps.dim() == 2:
            return maps
        if maps.dim() == 4 and maps.shape[1] <= _FEW:
            return maps.flatten(1)
        places = (1,) if maps.dim() == 3 and self.layout == "tokens" else tuple(range(2, maps.dim()))
        if prod(maps.shape[place] for place in places) == 1:
            return maps.flatten(1)
        return (maps.var(places) + _EPS).sqrt()


def similarities(rows: Tensor) -> Tensor:
    """S [B, B]: cosine similarities of rows [B, D], each centred by its own mean."""
    centred = F.normalize(rows - rows.mean(1, keepdim=True), dim=1, eps=_EPS)
    return centred @ centred.T
