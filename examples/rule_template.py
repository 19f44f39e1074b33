"""A rule to begin from: copy, rename, and fill in. Then

    unlocked check-rule my_rule.py

This one is a whole rule already: a local linear classifier. What it does not need may go, from the end upwards.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules import LayerInfo, LocalRule


class MyRule(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        # Parameters train with the layer; buffers are kept, saved and resumed. Modules draw by (seed, layer).
        self.classifier = nn.Linear(layer.num_features, layer.num_classes)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """The mean loss. Only `activations` and the parameters above get gradients; that is all a layer has."""
        return F.cross_entropy(self.scores(activations), labels)

    def scores(self, activations: Tensor) -> Tensor:
        """Optional: the layer's own prediction [B, n], for the accuracy of every layer."""
        scores: Tensor = self.classifier(activations.flatten(1))
        return scores
