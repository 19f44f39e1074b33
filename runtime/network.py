"""From a user's model to layers: shapes, rules, optimizers, measured costs."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models import Block, initialise
from unlocked.rules import CrossEntropy, LayerInfo, Rule
from unlocked.workers.layer import Layer, OptimizerFactory, StepFactory

__all__ = ["Network", "backpropagation_network", "build_layer", "build_network", "measure_costs"]

Model = nn.Sequential | Sequence[nn.Module]


@dataclass(frozen=True, slots=True)
class Network:
    """A model that is ready to be cut into stages.

    Attributes:
        blocks: the layers' networks, initialised; the last one gives the logits.
        infos: what each layer's rule may know of it.
        output_shapes: one sample's output of each layer, that is, the next layer's input.
        input_shape: one sample's input of the first layer.
    """

    blocks: list[Block]
    infos: list[LayerInfo]
    output_shapes: list[tuple[int, ...]]
    input_shape: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return [info.name for info in self.infos]


def build_network(
    model: Model, *, input_shape: tuple[int, ...], num_classes: int | None, seed: int, keep_weights: bool = False
) -> Network:
    """Names the layers, initialises them by (seed, layer), and follows one sample through to learn every shape.

    Args:
        model: blocks (`unlocked.models`), or any modules in order; the last one must give [B, num_classes].
        input_shape: one sample's, such as (C, H, W).
        num_classes: of the data; None: whatever the last layer tells apart.
        keep_weights: leave the parameters as they are instead of drawing them by (seed, layer).

    Raises:
        ValueError: no layers, shapes that don't chain (names both blocks and both shapes), or an output that is not
            [B, num_classes].
    """
    modules = list(model)
    if not modules:
        raise ValueError("the model has no layers; give at least an output layer that maps to the classes")
    blocks = [
        m if isinstance(m, Block) else Block.wrap(m, f"{type(m).__name__.lower()}{i + 1}")
        for i, m in enumerate(modules)
    ]
    blocks[-1].is_output = True
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"layer names must differ from each other, got {names}")
    if not keep_weights:
        for index, block in enumerate(blocks):
            initialise(block, seed, index)
    activations, outputs = _trace_shapes(blocks, input_shape)
    if num_classes is None and len(outputs[-1]) == 1:
        num_classes = outputs[-1][0]
    if num_classes is None or outputs[-1] != (num_classes,):
        raise ValueError(
            f"the last layer {names[-1]} gives {outputs[-1]} per sample, but the data has {num_classes or 'some'} "
            f"classes; end the model in a layer with output ({num_classes or 'number of classes'},)"
        )
    infos = [
        LayerInfo(
            name=block.name,
            index=i,
            activation_shape=activations[i],
            num_classes=num_classes,
            latent_size=_latent_size(block, activations[i]),
            hidden=block.hidden or 2048,
            reduced_rank=block.reduced_rank or 20,
            seed=seed,
        )
        for i, block in enumerate(blocks)
    ]
    return Network(blocks, infos, outputs, tuple(input_shape))


def backpropagation_network(network: Network) -> Network:
    """The same model as one layer that trains end to end: what a local rule is compared with."""
    names = [block.name for block in network.blocks]
    body = nn.Sequential(OrderedDict(zip(names, network.blocks, strict=True)))
    block = Block("network", body, is_output=True)
    last = network.infos[-1]
    info = LayerInfo(
        name="network",
        index=0,
        activation_shape=network.output_shapes[-1],
        num_classes=last.num_classes,
        latent_size=last.num_classes,
        hidden=last.hidden,
        reduced_rank=last.reduced_rank,
        seed=last.seed,
    )
    return Network([block], [info], [network.output_shapes[-1]], network.input_shape)


def build_layer(
    network: Network,
    index: int,
    *,
    rule: Rule | Sequence[Rule],
    optimizer: OptimizerFactory,
    device: torch.device,
    step: StepFactory | None,
    precision: str = "fp32",
) -> Layer:
    """Layer `index`, on its device. `rule` may be one per layer; the output layer always trains on cross-entropy."""
    info, block = network.infos[index], network.blocks[index]
    if block.is_output:
        chosen: Rule = CrossEntropy
    elif isinstance(rule, Sequence):
        if len(rule) < len(network.blocks) - 1:
            raise ValueError(f"{len(rule)} rules for {len(network.blocks) - 1} local layers; give one or one per layer")
        chosen = rule[index]
    else:
        chosen = rule
    return Layer(block, chosen(info), info, optimizer, device=device, step=step, precision=precision)


def measure_costs(
    make_layer: Callable[[int], Layer], network: Network, *, batch_size: int, device: torch.device, repeats: int = 5
) -> list[float]:
    """Seconds of one local step of every layer, the median of `repeats` after two warm-ups.

    `make_layer` builds throw-away layers; the network's own weights are put back afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *network.input_shape, generator=generator).to(device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(network.infos[0].num_classes, (batch_size,), generator=generator).to(device)
    costs = []
    for index, block in enumerate(network.blocks):
        saved = {name: value.clone() for name, value in block.state_dict().items()}
        layer = make_layer(index)
        times = []
        for _ in range(repeats + 2):
            start = _now(device)
            out = layer.forward(x)
            layer.step.update(labels)  # not `update`, which minds the loss: only the time counts here
            times.append(_now(device) - start)
        costs.append(median(times[2:]))
        block.load_state_dict(saved)
        x = out.clone()
    return costs


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _trace_shapes(
    blocks: list[Block], input_shape: tuple[int, ...]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """One sample's shape of every layer's activations and output."""
    activations, outputs = [], []
    x: Tensor = torch.zeros(2, *input_shape)
    for index, block in enumerate(blocks):
        training = block.training
        block.eval()
        try:
            a = block.body(x)
            out = block.tail(a)
        except (RuntimeError, ValueError, IndexError) as error:
            before = f"layer {blocks[index - 1].name}" if index else "the data"
            raise ValueError(
                f"the shapes don't chain: {before} gives {tuple(x.shape[1:])} per sample, which layer {block.name} "
                f"can't take ({str(error).strip().splitlines()[0]})"
            ) from error
        block.train(training)
        activations.append(tuple(a.shape[1:]))
        outputs.append(tuple(out.shape[1:]))
        x = out
    return activations, outputs


def _latent_size(block: Block, activation_shape: tuple[int, ...]) -> int:
    """The block's own choice; else 2 x 2 latents per channel (as most of the authors' layers), or all of a flat one."""
    if block.latent_size is not None:
        return int(block.latent_size)
    if len(activation_shape) == 3:
        return min(2, *activation_shape[1:])
    return int(activation_shape[-1])


def describe(network: Network) -> dict[str, Any]:
    """Layer names, output shapes and parameter counts, for config.json."""
    return {
        info.name: {"output": list(shape), "parameters": sum(p.numel() for p in block.parameters())}
        for info, shape, block in zip(network.infos, network.output_shapes, network.blocks, strict=True)
    }
