"""From a user's model to layers: shapes, rules, optimizers."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from unlocked.kernels.reference import Layout
from unlocked.models import Block, initialise, key_start_values
from unlocked.models.dropout import kept_dropout_keys
from unlocked.models.named_draws import named_draws
from unlocked.models.overwriting import Writes
from unlocked.rules import (
    CLASS_NUMBER,
    CrossEntropy,
    LayerInfo,
    LocalRule,
    Rule,
    TargetForm,
    Task,
    TaskLoss,
    needs_pass,
)
from unlocked.rules.task_kinds import CLASSIFICATION
from unlocked.runtime.batch_statistics import BatchStatistics
from unlocked.runtime.block_trials import made_up, try_blocks
from unlocked.runtime.layer_rules import Rules, choose_rule, make_rule
from unlocked.runtime.learned import Learned
from unlocked.runtime.model_blocks import Model, blocks_of
from unlocked.runtime.named_inputs import check_all_read, find_needs, rows_of, travelling
from unlocked.runtime.shapes import check_ownership_of_weights, follow_shapes
from unlocked.runtime.side_channel import SideChannel
from unlocked.workers.drawing import DrawingLayer
from unlocked.workers.heads import SplitBody, head_of, piecewise_step, split_body
from unlocked.workers.layer import Layer, OptimizerFactory, StepFactory
from unlocked.workers.pass_layer import PassLayer
from unlocked.workers.passing import PassStage
from unlocked.workers.source import Source
from unlocked.workers.stage import Stage
from unlocked.workers.views import ViewMaker

__all__ = [
    "Model",
    "Network",
    "RoutedBlocks",
    "backpropagation_network",
    "build_layer",
    "build_network",
    "build_stage",
    "check_weights",
    "kept_modes",
    "made_up_targets",
    "optimizer_of",
]


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
        writes: what each layer's block writes into of what it is given.
        side_channel: what the rules send beside activations and labels.
        scored: the layers whose own prediction is counted in evaluation; the output layer's is in any case.
        passes: some rule takes whole passes.
        task: what the run learns.
        target: what every stage gets of a sample's target.
        sums: how long each sum of the task's `measure` is.
        beside: one row [1, ...] of each tensor that the data brings beside its samples.
        needs: of each layer, the names of those that its block reads.
    """

    blocks: list[Block]
    infos: list[LayerInfo]
    output_shapes: list[tuple[int, ...]]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype = torch.float32
    batch_statistics: list[BatchStatistics] = field(default_factory=list)
    draws: list[frozenset[str]] = field(default_factory=list)
    writes: list[Writes] = field(default_factory=list)
    side_channel: SideChannel = field(default_factory=SideChannel)
    scored: tuple[str, ...] = ()
    passes: bool = False
    task: Task = CLASSIFICATION
    target: TargetForm = CLASS_NUMBER
    sums: Mapping[str, int] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    needs: tuple[tuple[str, ...], ...] = ()

    @property
    def needs_passes(self) -> bool:
        """Some rule needs more than a loss of activations and labels, or some layer more than its input."""
        return self.passes or any(self.side_channel.sums) or any(self.needs)

    def beside_of(self, layer: int, rows: int) -> dict[str, Tensor]:
        """Made-up tensors for what the layer reads beside its input."""
        return rows_of(self.beside, self.needs[layer] if self.needs else (), rows)

    @property
    def figure_names(self) -> tuple[str, ...]:
        """What the task tells of an evaluation besides loss and accuracy."""
        ones = [1.0] * self.num_sums
        return tuple(name for name, _ in self.task.read(ones, 1, self.sums).others)

    @property
    def num_sums(self) -> int:
        """How many numbers `Task.tally` makes of a micro-batch; of a classification loss, hits, hits among five."""
        return 2 + sum(size or 1 for size in self.sums.values())

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
    learned: Learned | None = None,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> Network:
    """Names the layers, follows one sample through to learn every shape, and settles the start values.

    Args:
        model: blocks (`unlocked.models`), or any modules in order; the last one must give [B, num_classes].
        input_shape: one sample's, such as (C, H, W).
        num_classes: of the data; None: whatever the last layer tells apart.
        seed: draws, by layer, what is still as a network of the project drew it. All other weights are kept.
        redraw: draw every parameter by (seed, layer) instead.
        sample: one sample to follow through; default: zeros, float32. Tokens are int64.
        learned: what is known of task and targets; None: classification.
        beside: one row [1, ...] of each tensor of the data beside its samples.

    Raises:
        ValueError: no layers, shapes that don't chain (names both blocks and both shapes), a block that gives anything
            but one float32 tensor, names or weights that two layers share, or an output that is not [B, num_classes];
            with `redraw`, parameters that can't be drawn anew (names them); a layer that draws random numbers which no
            key reaches (names layer and module); a tensor of the data beside its samples that nothing reads.
    """
    blocks = blocks_of(model)
    _take_to_host(blocks)
    if early := [block.name for block in blocks[:-1] if block.is_output]:
        raise ValueError(f"only the last layer is the output, but is_output is set for {', '.join(early)}")
    blocks[-1].is_output = True
    sample = torch.zeros(input_shape) if sample is None else sample
    needs = find_needs(blocks, beside)
    activations, outputs, layouts, batch_statistics = follow_shapes(blocks, sample, seed, beside=beside, needs=needs)
    check_ownership_of_weights(blocks)
    task, target, num_classes = (learned or Learned()).settled(num_classes, outputs[-1], sample.dtype, blocks[-1].name)
    check_all_read(blocks, needs, beside, task)
    if task.name == "tokens":
        pairs = zip(blocks, activations, strict=True)
        layouts = [block.layout or ("tokens" if len(one) == 2 else None) for block, one in pairs]
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
            task=task,
        )
        for i, block in enumerate(blocks)
    ]
    draws, writes = try_blocks(blocks, sample, outputs, beside, needs, seed)
    return Network(
        blocks,
        infos,
        outputs,
        tuple(input_shape),
        sample.dtype,
        batch_statistics,
        draws,
        writes,
        SideChannel(inputs=travelling(needs, beside) if any(needs) else ()),
        task=task,
        target=target,
        sums=task.sizes(num_classes, target, outputs[-1]),
        beside=beside,
        needs=tuple(needs),
    )


@contextlib.contextmanager
def kept_modes(network: Network) -> Iterator[None]:
    """Afterwards every module is in training or eval mode again, as the user left it, and dropout has no run's key:
    what was in eval mode before a run is frozen (`workers.layer.frozen_modules`), and a run ends in eval mode.

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
        with kept_dropout_keys(network.blocks):
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
    blocks: OrderedDict[str, nn.Module] = OrderedDict(zip(names, network.blocks, strict=True))
    used = tuple(name for name in network.beside if any(name in names for names in network.needs))
    body = RoutedBlocks(blocks, network.needs) if used else nn.Sequential(blocks)
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
        layout=last.layout,
        task=last.task,
    )
    return replace(
        network,
        blocks=[block],
        infos=[info],
        output_shapes=[network.output_shapes[-1]],
        draws=[frozenset[str]().union(*network.draws)],
        writes=[_of_all(network.writes)],
        side_channel=SideChannel(inputs=network.side_channel.inputs[:1]),
        needs=(used,) if used else (),
    )


class RoutedBlocks(nn.Sequential):
    """Blocks in a row, each with the named tensors that it reads."""

    def __init__(self, blocks: "OrderedDict[str, nn.Module]", needs: Sequence[Sequence[str]]) -> None:
        super().__init__(blocks)
        self._needs = needs

    def forward(self, x: Tensor, **beside: Tensor) -> Tensor:  # type: ignore[override]
        for block, names in zip(self, self._needs, strict=True):
            x = block(x, **{name: beside[name] for name in names})
        return x

    @property
    def head(self) -> nn.Linear | None:
        return head_of(cast(Block, self[-1]))

    def hidden(self, x: Tensor, **beside: Tensor) -> Tensor:
        """What `head` reads."""
        *before, last = zip(self, self._needs, strict=True)
        for block, names in before:
            x = block(x, **{name: beside[name] for name in names})
        inner = cast(SplitBody, split_body(cast(Block, last[0])))
        return inner.hidden(x, **{name: beside[name] for name in last[1]})


def _take_to_host(blocks: Sequence[Block]) -> None:
    """An earlier run, or the user, may have left them on a GPU; set-up makes its trials on the host."""
    for block in blocks:
        if any(tensor.device.type not in ("cpu", "meta") for tensor in (*block.parameters(), *block.buffers())):
            block.cpu()


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
    if network.task.name != "classification" and output_rule is CrossEntropy:
        output_rule = TaskLoss
    local_rule = make_rule(choose_rule(network.infos, index, rule, output_rule), info)
    sources = network.draws[index].union(*map(named_draws, local_rule.modules()), named_draws(optimizer))
    block = network.blocks[index]
    needs = network.needs[index] if network.needs else ()
    common: dict[str, Any] = {"device": device, "precision": precision, "needs": needs, "sums": network.num_sums}
    common |= {"kernels": getattr(step, "backend", None), "sample": _sample(network, index)}
    common["writes"] = network.writes[index]
    if needs_pass(local_rule):
        own = optimizer_of(local_rule, optimizer)
        return PassLayer(block, local_rule, info, own, step=step, sources=sources, **common)
    if network.task.name == "tokens" and isinstance(local_rule, TaskLoss) and head_of(block) is not None:
        step = piecewise_step(step)
    kind = partial(DrawingLayer, sources=sources) if sources else Layer
    return kind(block, local_rule, info, optimizer, step=step, **common)


def build_stage(
    network: Network, index: int, layers: range, built: Sequence[Layer], source: Source | None, views: ViewMaker | None
) -> Stage:
    """Stage `index` of `layers`, which have been built; stage 0 with the data."""
    if not network.needs_passes:
        return Stage(index, built, source)
    channel = network.side_channel
    leaves = [channel.leaves[i] if channel.leaves else {} for i in layers]
    inputs = [tuple(channel.inputs[i + 1]) if channel.inputs[i + 1 :] else () for i in layers]
    return PassStage(index, built, source, leaves=leaves, views=views, inputs=inputs)


def optimizer_of(rule: LocalRule, optimizer: OptimizerFactory) -> OptimizerFactory:
    """What builds the optimizer of a layer with this rule: the run's, the rule's own, or what builds none."""
    if isinstance(rule.optimizer, str):
        return optimizer
    if rule.optimizer is None:
        return lambda parameters: None  # type: ignore[return-value]
    own: OptimizerFactory = rule.optimizer
    return own


def made_up_targets(network: Network, rows: int, generator: torch.Generator) -> Tensor:
    """Targets that training would take: any class numbers, else zeros."""
    if network.target == CLASS_NUMBER:
        return torch.randint(network.infos[0].num_classes, (rows,), generator=generator)
    return network.target.made_up(rows)


def _of_all(writes: Sequence[Writes]) -> Writes:
    """Of blocks in a row: any of them may be given the first one's input, by those before it that change nothing."""
    return Writes(any(one.input for one in writes), frozenset().union(*(one.beside for one in writes)))


def _sample(network: Network, index: int) -> Tensor:
    """A made-up micro-batch of two rows of a layer's input."""
    shape = network.output_shapes[index - 1] if index else network.input_shape
    like = torch.zeros(shape, dtype=torch.float32 if index else network.input_dtype)
    return made_up(like, network.infos[index].seed)


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
