"""A transformer that learns without backpropagation through it: every layer trains by a local rule of its own.

An image of 8 x 8 pixels is a sequence of 16 patches. What passes from layer to layer are tokens [B, T, D]; a local rule
sees the mean token of its layer (`latent_size` pieces of the sequence, to be exact), and the residual connections lie
inside the layers. The layers pipeline like those of any other network; both commands print the same weights_sha256:

    python examples/transformer.py
    torchrun --standalone --nproc-per-node=2 examples/transformer.py
"""

import os
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.data import load_dataset
from unlocked.models import Block
from unlocked.rules import LLS
from unlocked.runtime import Trainer

PATCH, WIDTH, HEADS, LAYERS = 2, 64, 4, 3


class Patches(nn.Module):
    """Images [B, 1, H, W] -> tokens [B, T, WIDTH]: each patch projected, and told where it stands."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.project = nn.Linear(PATCH * PATCH, WIDTH)
        self.place = nn.Parameter(torch.empty(num_tokens, WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.place, std=0.5)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, kernel_size=PATCH, stride=PATCH)  # [B, PATCH * PATCH, T]
        tokens: Tensor = self.project(patches.transpose(1, 2)) + self.place
        return tokens


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and a feed-forward net, each with its residual connection: [B, T, D] -> [B, T, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y: Tensor = x + self.feed_forward(self.norm2(x))
        return y

    def attend(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.queries_keys_values(x).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))  # [B, HEADS, T, WIDTH / HEADS]
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(image_size: int, num_classes: int) -> list[Block]:
    """The layers: patches, `LAYERS` transformer layers, and the output layer on the mean token."""
    blocks = [Block("patches", Patches((image_size // PATCH) ** 2), latent_size=2)]
    blocks += [Block(f"transformer{i + 1}", TransformerLayer()) for i in range(LAYERS)]
    output = nn.Sequential(MeanToken(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes))
    return [*blocks, Block("output", output)]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # training starts from the weights that the constructors draw: the same ones in every process
    train, test = load_dataset("digits")
    trainer = Trainer(
        transformer(image_size=train.image_shape[-1], num_classes=train.num_classes),
        rule=LLS(temperature=0.1),
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01),
        engine="processes" if "RANK" in os.environ else "sequential",
        seed=0,
    )
    result = trainer.fit(train, epochs=5, batch_size=32, eval_data=test)
    if not result.is_complete:
        return  # only rank 0 knows the whole run
    for epoch in result.epochs:
        losses = ", ".join(f"{name} {loss:.3f}" for name, loss in epoch.local_losses)
        print(f"epoch {epoch.epoch + 1}: test accuracy {epoch.eval_acc1:.1f} %, local losses {losses}")
    print(f"{result.train_seconds:.1f} s in {len(result.stages)} stages, weights_sha256 {result.weights_sha256}")


if __name__ == "__main__":
    main()
