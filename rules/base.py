"""What a layer minimises: the interface between a layer and its local rule.

A rule of one's own is a `LocalRule` with a `forward(activations, labels) -> loss`, and nothing else if it needs nothing
else; hand its class (or any callable that takes a `LayerInfo`) to `Trainer(rule=...)`:

    class Prototype(LocalRule):
        def __init__(self, layer: LayerInfo) -> None:
            super().__init__(layer)
            self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))

        def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
            return -torch.cdist(activations.flatten(1), self.centres).log_softmax(1).gather(1, labels[:, None]).mean()
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.kernels.reference import HeadResult, Layout
from unlocked.rules.passes import Carried, LayerPass, Views
from unlocked.rules.reading import read_latents
from unlocked.rules.task_kinds import CLASSIFICATION
from unlocked.rules.tasks import Task

__all__ = ["CrossEntropy", "HeadArguments", "LayerInfo", "LocalRule", "Rule", "TaskLoss", "has_scores", "needs_pass"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """What a rule may know of the layer it is built for."""

    name: str
    index: int
    """Place in the network, from 0."""
    activation_shape: tuple[int, ...]
    """Shape of one sample's activations: (C, H, W), (C, L), (T, D) or (D,)."""
    num_classes: int
    """Scores of one prediction: classes, labels, numbers, or the tokens of a vocabulary, as the task has it."""
    latent_size: int
    """p, the side of the latents' pooling; for (C, L), (T, D) the pieces of L or T, for (D,) the number of latents."""
    hidden: int
    """Width of the random feedback R of the `*_Random` rules and LocalLosses."""
    reduced_rank: int
    """Rows r of LLS_MxM_reduced's basis."""
    seed: int
    following_shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of one sample's activations in the layers after this one, without the output layer."""
    input_shape: tuple[int, ...] = ()
    """Of one sample of the network's input."""
    layout: Layout | None = None
    """Of two-dimensional activations: "channels_first" (C, L) or "tokens" (T, D). None: nobody knows."""
    task: Task = CLASSIFICATION
    """What the run learns."""

    @property
    def num_features(self) -> int:
        """Activations of one sample, flattened."""
        return prod(self.activation_shape)

    @property
    def num_latents(self) -> int:
        """Latents of one prediction. Of a sample, as `pool_latents` makes them: C p p of (C, H, W), C p of (C, L), D p
        of (T, D), p of (D,). Where the task is of positions, one position's features: D of (T, D), C of (C, H, W).

        Raises:
            ValueError: activations that have none, or whose layout is not known; says how to declare it.
        """
        shape, p = self.activation_shape, self.latent_size
        if self.task.dense:
            return self._position_features()
        if len(shape) == 2 and self.layout is None:
            raise ValueError(
                f"nothing tells whether its activations {shape} are (C, L), channels first as a 1-d convolution gives "
                'them, or (T, D), tokens; say so with Block(..., layout="channels_first") or layout="tokens", or '
                "Block.wrap(module, name, layout=...)"
            )
        if len(shape) > 3:
            raise ValueError(f"latents are made of (C, H, W), (C, L), (T, D) or (D,), not of {shape}")
        return (
            p
            if len(shape) == 1
            else shape[-1 if self.layout == "tokens" and len(shape) == 2 else 0] * p ** (len(shape) - 1)
        )

    def latents(self, activations: Tensor) -> Tensor:
        """[N, num_latents], a row for every prediction that the layer can make: a sample's pooled activations, or a
        position's features, sample by sample."""
        if not self.task.dense:
            return read_latents(activations, self.latent_size, self.layout)
        return activations.movedim(1, -1).flatten(0, 2) if activations.dim() == 4 else activations.flatten(0, 1)

    def targets(self, targets: Tensor) -> Tensor:
        """The targets [N, ...] of those predictions, of a micro-batch's [B, ...]."""
        return self.task.targets_at(targets, self.activation_shape)

    def _position_features(self) -> int:
        shape = self.activation_shape
        if len(shape) == 3 and self.task.name == "segmentation":
            return shape[0]
        if len(shape) == 2 and self.layout == "tokens" and self.task.name == "tokens":
            return shape[1]
        if len(shape) == 2 and self.layout != "tokens" and self.task.name == "tokens":
            raise ValueError(
                f"the task tokens needs activations (T, D), and nothing tells that {shape} are; say so with "
                'Block(..., layout="tokens")'
            )
        wanted = "(C, h, w)" if self.task.name == "segmentation" else "(T, D)"
        raise ValueError(f"the task {self.task.name} needs activations {wanted} at every layer, got {shape}")

    def generator(self) -> torch.Generator:
        """A fresh CPU generator keyed by (seed, layer): the only source of a rule's initial values."""
        return torch.Generator().manual_seed(philox_int(self.seed, Purpose.RULE, self.index))


class HeadArguments(NamedTuple):
    """What `kernels.local_head` needs from a rule that has the closed form of design section 5."""

    basis: Tensor | None
    modulation: Tensor | None
    normalize: bool
    temperature: float
    label_smoothing: float
    basis_gradient: bool


class LocalRule(nn.Module):
    """Turns one layer's activations and the labels into a loss. Owns its parameters; its optimizer is the layer's.

    A rule is written at the lowest of three levels that it needs:

    1. `forward(activations, labels) -> loss`.
    2. `step(layer_pass) -> loss`: sees the layer's input, block and weights, the time, a keyed generator.
    3. What is declared: `carries` and `receives` (the side channel), `views`, `scores`, `read_out`.

    Whatever it keeps from step to step lies in buffers: those are saved, resumed and part of the digest.
    """

    takes: Sequence[str] | None = None
    """The names of the tasks whose targets it takes (`unlocked.rules.TASKS`, "own" for a user's); None: of any."""
    optimizer: Any = "layer"
    """Of the block's and the rule's parameters: "layer", the run's; None: `step` changes the weights itself; or what
    builds one from parameters."""
    needs_graph: bool = True
    """False: `step` gets its activations without a graph, which costs less."""
    receives: Sequence[str] = ()
    """Names of the side channel's tensors that it reads. Every layer between passes them on."""
    carries: Mapping[str, Carried] = {}
    """What it hands on beside the layer's output, by name: what `carry` gives."""
    views: Views | None = None
    """How stage 0 makes its rows of the data; all local layers of a network have the same."""
    reads_head: bool = False
    """As an output layer's rule of tokens: `step` makes the scores itself, in pieces. Where the block tells its linear
    head, `activations` are what that reads, and the pass has the head; [B, T, V] is never whole then."""
    read_out: float | None = None
    """The weight of its `scores` in the run's prediction, which then is the sum over all layers that have one; None:
    not in it. Where no layer has one, the output layer's scores are the prediction."""

    def __init__(self, layer: "LayerInfo | None" = None) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the batch, a scalar that autograd can follow.

        Args:
            activations: [B, C, H, W], [B, C, L], [B, T, D] or [B, D], the block's output before any pooling.
            labels: [B], int64, or whatever the targets of the task are.
        """
        raise NotImplementedError

    def step(self, layer_pass: LayerPass) -> Tensor:
        """The mean loss over the samples of a training micro-batch, a scalar.

        If it has a graph, its gradients are taken; if not, those that `step` has left in the parameters' `grad`
        (which are None before it) count, and the layer's optimizer makes its step by them. With `optimizer = None`
        there is no such step. The output has been handed on before: what `step` changes counts from the next
        micro-batch on.
        """
        loss: Tensor = self(layer_pass.activations, layer_pass.labels)
        return loss

    def carry(self, layer_pass: LayerPass) -> Mapping[str, Tensor]:
        """What leaves on the side channel with this micro-batch's output: a tensor for every name in `carries`.

        Called before `step`, without gradients: what leaves was computed by the weights before the update.
        """
        raise NotImplementedError

    def scores(self, activations: Tensor) -> Tensor:
        """The layer's own prediction: [B, num_classes], the larger the likelier; of a task of positions [N,
        num_classes], a row for each as `LayerInfo.latents` orders them. With it every evaluation also tells how often
        the layer is right.

        Args:
            activations: in eval mode; [evaluate * B, ...] where the rule has views.
        """
        raise NotImplementedError

    def head_arguments(self) -> HeadArguments | None:
        """The closed form's inputs, or None: the layer then trains through autograd."""
        return None

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        """The gradients of this rule's trained parameters, in the order of `parameters()`, from the closed form."""
        raise NotImplementedError


def needs_pass(rule: LocalRule) -> bool:
    """It has more to it than a loss of activations and labels: it runs by whole passes."""
    kind = type(rule)
    declares = bool(rule.carries or rule.receives) or rule.views is not None or rule.optimizer != "layer"
    return declares or kind.step is not LocalRule.step or kind.carry is not LocalRule.carry


def has_scores(rule: LocalRule) -> bool:
    """It makes a prediction of its own."""
    return type(rule).scores is not LocalRule.scores


Rule = Callable[[LayerInfo], LocalRule]
"""Builds the rule of one layer: a `LocalRule` class, or a configured one such as `LLS(temperature=0.5)`."""


class CrossEntropy(LocalRule):
    """Plain cross-entropy of logits [B, N]: what the output layer trains on (temperature 1, no label smoothing)."""

    takes = ("classification",)

    def __init__(self, layer: LayerInfo | None = None) -> None:
        super().__init__()

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(activations, labels)

    def scores(self, activations: Tensor) -> Tensor:
        return activations

    def head_arguments(self) -> HeadArguments:
        return HeadArguments(None, None, False, 1.0, 0.0, False)

    def head_gradients(self, result: HeadResult) -> list[Tensor]:
        return []


class TaskLoss(LocalRule):
    """The task's own loss of what the layer gives: what the output layer trains on where the task is not
    classification, whose loss is `CrossEntropy`."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.task = layer.task

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return self.task.loss(*self.task.rows(activations, labels))
