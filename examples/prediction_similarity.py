"""A rule of one's own, outside the LLS family: prediction plus similarity (Nokland and Eidnes, ICML 2019).

A layer's loss is that of a local linear classifier, plus how far the layer's pairwise similarities within the
micro-batch are from those of the labels: sample pairs of one class shall look alike, others not.

    python examples/prediction_similarity.py
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import LayerInfo, LocalRule
from unlocked.runtime import Trainer


class PredictionSimilarity(LocalRule):
    """(1 - beta) * cross-entropy of a local classifier + beta * |S(activations) - S(labels)|^2, beta = 0.99."""

    def __init__(self, layer: LayerInfo, beta: float = 0.99) -> None:
        super().__init__()
        self.beta, self.classes = beta, layer.num_classes
        self.latent_size = layer.latent_size
        generator = layer.generator()
        self.classifier = nn.Parameter(0.01 * torch.randn(layer.num_classes, layer.num_latents, generator=generator))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        # The paper compares the standard deviation over each feature map; flat activations are taken as they are.
        features = activations.flatten(2).std(2) if activations.dim() == 4 else activations
        targets = F.one_hot(labels, self.classes).to(activations.dtype)
        similarity = F.mse_loss(similarities(features), similarities(targets))
        latents = activations if activations.dim() == 2 else F.adaptive_avg_pool2d(activations, self.latent_size)
        prediction = F.cross_entropy(latents.flatten(1) @ self.classifier.T, labels)
        return (1 - self.beta) * prediction + self.beta * similarity


def similarities(rows: Tensor) -> Tensor:
    """Cosine similarities [B, B] of centred rows [B, D]."""
    centred = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    return centred @ centred.T


def main() -> float:
    torch.set_num_threads(1)
    train, test = load_dataset("digits")
    trainer = Trainer(
        small_conv(in_channels=1, num_classes=10, image_size=8),
        rule=PredictionSimilarity,
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        seed=0,
    )
    result = trainer.fit(train, epochs=5, batch_size=64, eval_data=test)
    for epoch in result.epochs:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in epoch.local_losses)
        print(f"epoch {epoch.epoch + 1}: test accuracy {epoch.eval_acc1:.1f} %, local losses {losses}")
    assert result.test_acc1 is not None
    return result.test_acc1


if __name__ == "__main__":
    main()
