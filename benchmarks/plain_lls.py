"""LLS on SmallConv as one would first write it in PyTorch: the baseline of benchmarks/cpu_step.py.

    python benchmarks/plain_lls.py --threads 2 --steps 200        # prints one line of JSON

A loop over layers, each with its own loss through autograd and its own torch.optim.Adam; memory formats, fused
options and everything else are left at PyTorch's defaults. It shares no code with the runtime.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128)
LATENT_SIDES = (4, 2, 2)


class PlainLLS:
    """SmallConv with local losses.

    Args:
        classes: of the labels; images are [B, 3, 32, 32].
    """

    def __init__(self, classes: int = 10, temperature: float = 0.5, lr: float = 0.01) -> None:
        channels = (3, *WIDTHS)
        self.blocks = [
            nn.Sequential(nn.Conv2d(channels[i], channels[i + 1], 3, padding=1), nn.BatchNorm2d(channels[i + 1]))
            for i in range(3)
        ]
        self.blocks.append(nn.Sequential(nn.Linear(WIDTHS[-1] * 4, 512), nn.BatchNorm1d(512)))
        self.output = nn.Linear(512, classes)
        self.temperature = temperature
        sizes = [width * side * side for width, side in zip(WIDTHS, LATENT_SIDES, strict=True)] + [512]
        frequencies = torch.linspace(50, 512, classes)[:, None]
        self.bases = [torch.sin(frequencies * torch.arange(size, dtype=torch.float32)) for size in sizes]
        layers = [*self.blocks, self.output]
        self.optimizers = [torch.optim.Adam(layer.parameters(), lr=lr) for layer in layers]

    def step(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """One micro-batch through all layers; their losses."""
        x, losses = images, []
        for index, block in enumerate(self.blocks):
            if index == 3:
                x = F.adaptive_avg_pool2d(x, 2).flatten(1)
            a = F.leaky_relu(block(x.detach()), 0.01)
            latents = F.adaptive_avg_pool2d(a, LATENT_SIDES[index]).flatten(1) if index < 3 else a
            scores = F.normalize(latents) @ self.bases[index].T / self.temperature
            losses.append(self._update(index, F.cross_entropy(scores, labels)))
            x = F.max_pool2d(a, 2) if index < 2 else a
        self.logits = self.output(x.detach())
        losses.append(self._update(4, F.cross_entropy(self.logits, labels)))
        return losses

    def _update(self, index: int, loss: Tensor) -> Tensor:
        self.optimizers[index].zero_grad()
        loss.backward()
        self.optimizers[index].step()
        return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # A data set of the size of CIFAR-10's training set, normalised beforehand: the input costs a gather.
    images, labels = torch.randn(50_000, 3, 32, 32), torch.randint(0, 10, (50_000,))
    model, order = PlainLLS(), torch.randperm(50_000)
    warm_up = 5
    for step in range(options.steps + warm_up):
        if step == warm_up:
            began = time.perf_counter()
        index = order[torch.arange(step * options.batch_size, (step + 1) * options.batch_size) % 50_000]
        losses = model.step(images[index], labels[index])
    seconds = time.perf_counter() - began
    rate = options.steps * options.batch_size / seconds
    print(json.dumps({"images_per_second": rate, "local_losses": [float(loss) for loss in losses]}, allow_nan=False))


if __name__ == "__main__":
    main()
