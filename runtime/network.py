"""From a user's model to layers: shapes, rules, optimizers."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from unlocked.kernels.reference import Layout
from unlocked.models import Block, initialise, key_start_values
from unlocked.models.chance import find_draws
from unlocked.models.named_draws import named_draws
from unlocked.rules import CrossEntropy, LayerInfo, LocalRule, Rule, needs_pass
from unlocked.runtime.batch_statistics import BatchStatistics
from unlocked.runtime.layer_rules import Rules, choose_rule, make_rule
from unlocked.runtime.shapes import check_ownership_of_weights, follow_shapes
from unlocked.runtime.side_channel import SideChannel
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.layer import Layer, OptimizerFactory, StepFactory
from unlocked.workers.passing import PassLayer

__all__ = [
    "Model",
    "Network",
    "backpropagation_network",
    "build_layer",
    "build_network",
    "check_weights",
    "kept_modes",
    "optimizer_of",
]

Model = nn.Sequential | nn.ModuleList | Sequence[nn.Module]
"""The layers in order: `unlocked.models.Block`s, or any modules."""


@dataclass(frozen=True, slots=True)
class Network:
    """A model that is ready to be cut into stages.

    Attributes:
        blocks: the layers' networks with their start values; the last one gives the logits.
        infos: what each layer's rule may know of it.
        output_shapes: one sample's output of each layer, that is, the next layer's input.
        input_shape: one sample's input of the first layer.
        input_dtype: its type: float32, or int64 where the first layer reads tokens.
        batch_statistics: every normalisation by the micro-batch's own statistics.
        draws: the global generators that each layer draws from (`unlocked.models.generators.SOURCES`).
        side_channel: what the rules send beside activations and labels.
        scored: the layers whose own prediction is counted in evaluation; the output layer's is in any case.
        passes: some rule takes whole passes.
    """

    blocks: list[Block]
    infos: list[LayerInfo]
    output_shapes: list[tuple[int, ...]]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype = torch.float32
    batch_statistics: list[BatchStatistics] = field(default_factory=list)
    draws: list[frozenset[str]] = field(default_factory=list)
    side_channel: SideChannel = field(default_factory=SideChannel)
    scored: tuple[str, ...] = ()
    passes: bool = False

    @property
    def needs_passes(self) -> bool:
        """Some rule needs more than a loss of activations and labels."""
        return self.passes or any(self.side_channel.sums)

    @property
    def predicts_otherwise(self) -> bool:
        """The run's prediction is not that of the output layer for the data as it is."""
        views = self.side_channel.views
        return any(self.side_channel.sums) or (views is not None and views.evaluate > 1)

    @property
    def names(self) -> list[str]:
        return [info.name for info in self.infos]


def build_network(
    model: Model,
    *,
    input_shape: tuple[int, ...],
    num_classes: int | None,
    seed: int,
    redraw: bool = False,
    sample: Tensor | None = None,
) -> Network:
    """Names the layers, follows one sample through to learn every shape, and settles the start values.

    Args:
        model: blocks (`unlocked.models`), or any modules in order; the last one must give [B, num_classes].
        input_shape: one sample's, such as (C, H, W).
        num_classes: of the data; None: whatever the last layer tells apart.
        seed: draws, by layer, what is still as a network of the project drew it. All other weights are kept.
        redraw: draw every parameter by (seed, layer) instead.
        sample: one sample to follow through; default: zeros, float32. Tokens are int64.

    Raises:
        ValueError: no layers, shapes that don't chain (names both blocks and both shapes), a block that gives anything
            but one float32 tensor, names or weights that two layers share, or an output that is not [B, num_classes];
            with `redraw`, parameters that can't be drawn anew (names them); a layer that draws random numbers which no
            key reaches (names layer and module).
    """
    blocks = _blocks(model)
    names = [block.name for block in blocks]
    if len(set(names)) != len(names):
        raise ValueError(f"layer names must differ from each other, got {names}")
    if early := [block.name for block in blocks[:-1] if block.is_output]:
        raise ValueError(f"only the last layer is the output, but is_output is set for {', '.join(early)}")
    blocks[-1].is_output = True
    sample = torch.zeros(input_shape) if sample is None else sample
    activations, outputs, layouts, batch_statistics = follow_shapes(blocks, sample, seed)
    check_ownership_of_weights(blocks)
    if num_classes is None and len(outputs[-1]) == 1:
        num_classes = outputs[-1][0]
    if num_classes is None or outputs[-1] != (num_classes,):
        raise ValueError(
            f"the last layer {names[-1]} gives {outputs[-1]} per sample, but the data has {num_classes or 'some'} "
            f"classes; end the model in a layer with output ({num_classes or 'number of classes'},)"
        )
    for index, block in enumerate(blocks):
        (initialise if redraw else key_start_values)(block, seed, index)
    infos = [
        LayerInfo(
            name=block.name,
            index=i,
            activation_shape=activations[i],
            num_classes=num_classes,
            latent_size=_latent_size(block, activations[i], layouts[i]),
            hidden=block.hidden or 2048,
            reduced_rank=block.reduced_rank or 20,
            seed=seed,
            following_shapes=tuple(activations[i + 1 : -1]),
            input_shape=tuple(input_shape),
            layout=layouts[i],
        )
        for i, block in enumerate(blocks)
    ]
    inputs = chain([sample], map(torch.zeros, outputs[:-1]))  # one at a time
    draws = [find_draws(block, partial(_made_up, like, seed)) for block, like in zip(blocks, inputs, strict=True)]
    return Network(blocks, infos, outputs, tuple(input_shape), sample.dtype, batch_statistics, draws)


@contextlib.contextmanager
def kept_modes(network: Network) -> Iterator[None]:
    """Afterwards every module is in training or eval mode again, as the user left it: what was in eval mode before a
    run is frozen (`unlocked.workers.layer.frozen_modules`), and a run itself ends in eval mode.

    Raises:
        ValueError: everything is in eval mode though there is something to train, as `model.eval()` leaves it.
    """
    bodies = [module for block in network.blocks for module in block.body.modules()]
    if not any(m.training for m in bodies) and any(p.requires_grad for m in bodies for p in m.parameters()):
        raise ValueError(
            "the whole model is in eval mode, in which nothing but what is frozen stays during training; call train() "
            "on it, then eval() on the modules that shall keep their statistics and drop nothing"
        )
    modes = [(module, module.training) for block in network.blocks for module in block.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_weights(network: Network) -> None:
    """Raises: ValueError: a weight that training would begin with is NaN or infinite; names it."""
    for block in network.blocks:
        for name, parameter in block.named_parameters():
            if parameter.requires_grad and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"layer {block.name} begins with values that are not finite in {name}; give finite weights, or let "
                    "them be drawn (redraw=True)"
                )


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
    return Network(
        [block],
        [info],
        [network.output_shapes[-1]],
        network.input_shape,
        network.input_dtype,
        network.batch_statistics,
        [frozenset[str]().union(*network.draws)],
    )


def build_layer(
    network: Network,
    index: int,
    *,
    rule: Rules,
    optimizer: OptimizerFactory,
    device: torch.device,
    step: StepFactory | None,
    precision: str = "fp32",
    output_rule: Rule = CrossEntropy,
) -> Layer:
    """Layer `index`, on its device; the last one trains by `output_rule`."""
    info = network.infos[index]
    local_rule = make_rule(choose_rule(network.infos, index, rule, output_rule), info)
    sources = network.draws[index].union(*map(named_draws, local_rule.modules()), named_draws(optimizer))
    block = network.blocks[index]
    if needs_pass(local_rule):
        own = optimizer_of(local_rule, optimizer)
        return PassLayer(block, local_rule, info, own, device=device, precision=precision, sources=sources)
    kind = partial(DrawingLayer, sources=sources) if sources else Layer
    shape, dtype = network.input_shape, network.input_dtype
    sample = torch.zeros(network.output_shapes[index - 1]) if index else torch.zeros(shape, dtype=dtype)
    made_up = _made_up(sample, info.seed)
    return kind(block, local_rule, info, optimizer, device=device, step=step, precision=precision, sample=made_up)


def optimizer_of(rule: LocalRule, optimizer: OptimizerFactory) -> OptimizerFactory:
    """What builds the optimizer of a layer with this rule: the run's, the rule's own, or what builds none."""
    if isinstance(rule.optimizer, str):
        return optimizer
    if rule.optimizer is None:
        return lambda parameters: None  # type: ignore[return-value]
    own: OptimizerFactory = rule.optimizer
    return own


def _made_up(sample: Tensor, seed: int) -> Tensor:
    """A micro-batch of two samples like this one: tokens as they are, anything else normally distributed."""
    shape = (2, *sample.shape)
    if not sample.is_floating_point():
        return sample.expand(shape).clone()
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed & 0x7FFFFFFF))


def _latent_size(block: Block, activation_shape: tuple[int, ...], layout: Layout | None) -> int:
    """The block's own choice; else 2 x 2 latents per channel (as most of the authors' layers), 2 in one dimension, the
    mean token of a sequence, or all of flat activations."""
    if block.latent_size is not None:
        return int(block.latent_size)
    if len(activation_shape) == 3:
        return min(2, *activation_shape[1:])
    if layout == "channels_first":
        return min(2, activation_shape[1])
    return 1 if len(activation_shape) == 2 else int(activation_shape[-1])


def _blocks(model: Model) -> list[Block]:
    """The model's modules as blocks; a Sequential's own names are kept, numbers become the class's name."""
    if isinstance(model, nn.Module) and not isinstance(model, nn.Sequential | nn.ModuleList):
        raise ValueError(
            f"the model is one {type(model).__name__}; say where its layers begin, with "
            "unlocked.models.split(model, at=[...]), or give an nn.Sequential or a list of modules"
        )
    named = list(model.named_children()) if isinstance(model, nn.Module) else [("", m) for m in model]
    if isinstance(model, nn.Sequential | nn.ModuleList) and len(named) != len(model):
        named = [(str(i), m) for i, m in enumerate(model)]  # named_children leaves a second use of a module out
    if not named:
        raise ValueError("the model has no layers; give at least an output layer that maps to the classes")
    blocks = []
    for number, (name, module) in enumerate(named, start=1):
        if not isinstance(module, nn.Module):
            raise ValueError(f"entry {number} of the model is a {type(module).__name__}; every layer is an nn.Module")
        if isinstance(module, Block):
            blocks.append(module)
        else:
            kind = f"{type(module).__name__.lower()}{number}"
            blocks.append(Block.wrap(module, kind if name.isdigit() or not name else name))
    return blocks
