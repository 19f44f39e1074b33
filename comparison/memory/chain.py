"""Chains of equal convolutional blocks, ready to train by backpropagation or a local rule: what the studies measure."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from unlocked.comparison.memory.results import ACCUMULATED, BP, CHECKPOINTED, ChainSettings
from unlocked.models import Block, ConvBlock, OutputBlock, keyed_generator
from unlocked.models.blocks import Pool
from unlocked.rules import Rule, get_rule
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.workers.fused import choose_step
from unlocked.workers.stage import Stage

__all__ = ["build_chain", "chain"]


def chain(depth: int, settings: ChainSettings) -> list[Block]:
    """`depth` equal convolutional blocks [B, channels, image_size, image_size], and an output layer, drawn by the
    settings' seed: each process of a pipeline builds its own."""
    c = settings.channels
    last = depth - 1
    blocks: list[Block] = []
    for i in range(depth):
        # The last block pools to 2 x 2, so that the output layer is small whatever the image.
        pool: Pool = "average" if i == last else "none"
        with keyed_generator(settings.seed, i):
            blocks.append(ConvBlock(c, c, name=f"conv{i + 1}", pool=pool, pool_size=2 if i == last else 1))
    with keyed_generator(settings.seed, depth):
        return [*blocks, OutputBlock(4 * c, settings.num_classes)]


def build_chain(method: str, depth: int, settings: ChainSettings, device: torch.device) -> tuple[Stage, Tensor, Tensor]:
    """A stage with the whole chain, its images and its labels, ready to train by `method` (see `measure`)."""
    shape = (settings.channels, settings.image_size, settings.image_size)
    network = build_network(
        chain(depth, settings), input_shape=shape, num_classes=settings.num_classes, seed=settings.seed
    )
    rules: Rule | Sequence[Rule] = []
    if method == CHECKPOINTED:
        network = _checkpointed_network(network)
    elif method in (BP, ACCUMULATED):
        network = backpropagation_network(network)
    else:
        rules = get_rule(method, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    layers = [
        build_layer(
            network,
            index,
            rule=rules,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
            device=device,
            step=choose_step(settings.kernels, device),
        )
        for index in range(len(network.blocks))
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(settings.batch_size, *shape, generator=generator).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(settings.num_classes, (settings.batch_size,), generator=generator).to(device)
    return Stage(0, layers), x, labels


class _Checkpointed(nn.Module):
    """Blocks in about sqrt(depth) segments, of which only the inputs live until the backward pass."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        segments = max(1, round(math.sqrt(len(self.blocks))))
        result: Tensor = checkpoint_sequential(self.blocks, segments, x, use_reentrant=False)
        return result


def _checkpointed_network(network: Network) -> Network:
    whole = backpropagation_network(network)
    return replace(whole, blocks=[Block("network", nn.Sequential(_Checkpointed(network.blocks)), is_output=True)])
